"""Build description of imdc. Tool settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "imdc" / "__init__.py").read_text(), flags=re.MULTILINE)[1]

DEV = [
    "hypothesis>=6.100",
    "matplotlib>=3.8",
    "mypy>=1.13",
    # Adapters in saved caches; 4 MB, and nothing that accelerate does not bring.
    "peft>=0.18",
    "pre-commit>=3.5",
    "pytest>=8.0",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.5",
    "ruff>=0.8",
    "setuptools>=77",
    # Quantised weights; transformers reads them from 0.15 on.
    "torchao>=0.15",
]

setup(
    name="imdc",
    version=VERSION,
    description="Prefill very long prompts with Hugging Face models in bounded memory",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # The sources of imdc.kernels lie in ./kernels. A top-level package of that name is never shipped: it would land
    # on Hugging Face's own `kernels`, which transformers imports.
    packages=[
        "imdc",
        "imdc.cache",
        "imdc.cli",
        "imdc.kernels",
        "imdc.model",
        "imdc.planner",
        "imdc.prefill",
        "imdc.profiler",
    ],
    package_dir={"imdc": "imdc", "imdc.kernels": "kernels"},
    package_data={"imdc": ["py.typed"], "imdc.cli": ["report.css", "report.html", "report.js"]},
    install_requires=[
        "einops>=0.8",
        "rich>=13.7",
        "safetensors>=0.8",
        "torch>=2.11",
        # The upper bound is the release after the newest tested one, so that nobody gets an untested release unasked.
        "transformers>=5.17,<5.25",
    ],
    extras_require={
        "demo": ["accelerate>=1.1", "gguf>=0.17"],
        "triton": ["triton>=3.6; platform_system == 'Linux'"],
        # Pure Python, for Hopper and Blackwell; FlashAttention 3 and 2, which compile, work too.
        "flash": ["flash-attn-4>=4.0.0b1"],
        # 0.4.13 is the release whose LongBench prompts bench/longbench_tasks.py corrects.
        "bench": ["accelerate>=1.1", "gguf>=0.17", "lm-eval[longbench]>=0.4.13", "matplotlib>=3.8"],
        "plot": ["matplotlib>=3.8"],
        "dev": DEV,
    },
    entry_points={"console_scripts": ["imdc=imdc.cli.main:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
