"""imdc as a model of lm-evaluation-harness: log-likelihoods through an imdc cache, whole prompts, `imdc eval`."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks.manager import TaskManager

from imdc.cli import main as cli
from imdc.cli.eval import harness_arguments
from imdc.cli.harness import ImdcLM, cut_middle
from imdc.errors import ConfigError, UnsupportedCallError
from imdc.model.loading import LoadError

# Without the blank at its end, which the harness would move into the continuation.
PROSE = ("It was a bright cold day in April, and the clocks were striking thirteen. " * 6).rstrip()


def stock(folder: Path, **others: Any) -> Any:
    return HFLM(str(folder), device="cpu", dtype="float32", **others)


def ours(folder: Path, **others: Any) -> ImdcLM:
    return ImdcLM(str(folder), device="cpu", dtype="float32", **others)


def likelihoods(lm: Any, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    found: list[tuple[float, bool]] = lm.loglikelihood(requests, disable_tqdm=True)
    return found


CHOICES = [(PROSE, choice) for choice in (" Yes", " No, never", " x")] + [("Short.", " Yes"), (PROSE, " No, never")]


def test_loglikelihoods_equal_the_stock_models_where_all_is_kept(tiny_model_dir: Path) -> None:
    lm = ours(tiny_model_dir, memory_tokens=1024, chunk_tokens=100)
    got, wanted = likelihoods(lm, CHOICES), likelihoods(stock(tiny_model_dir), CHOICES)
    assert lm.handle.report is not None
    # Up to eleven tokens of about -6 each; both in float32.
    assert [score for score, _ in got] == pytest.approx([score for score, _ in wanted], abs=1e-3)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in wanted]
    assert got[1] == got[4]


def test_loglikelihoods_are_read_through_imdc(tiny_model_dir: Path) -> None:
    lm = ours(tiny_model_dir, memory_tokens=64, chunk_tokens=64)
    steps: list[Any] = []
    engine = lm.handle._engine
    engine.on_step = steps.append
    got, wanted = likelihoods(lm, CHOICES), likelihoods(stock(tiny_model_dir), CHOICES)
    # Each of the two contexts is read once, whatever the number of its continuations.
    contexts = [step for step in steps if step.prompt_tokens in (len(PROSE), len("Short."))]
    assert sorted(step.prompt_tokens for step in contexts if step.index == 0) == [len("Short."), len(PROSE)]
    assert sum(step.chunk_tokens for step in contexts) == len(PROSE) + len("Short.")
    assert max(step.memory_after for step in contexts) == 64
    long, short = [0, 1, 2, 4], 3
    assert all(abs(got[index][0] - wanted[index][0]) > 1e-2 for index in long)
    assert got[short][0] == pytest.approx(wanted[short][0], abs=1e-3)


def test_a_greedy_continuation_is_called_so(tiny_model_dir: Path) -> None:
    lm = ours(tiny_model_dir, memory_tokens=64, chunk_tokens=64)
    ids = torch.tensor([lm.tok_encode(PROSE)])
    output = lm.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    new = output[0, ids.shape[1] :].tolist()
    other = [*new[:-1], (new[-1] + 1) % 200]
    context = ids[0].tolist()
    (greedy, _), (same, is_greedy), (worse, is_not) = (
        lm._loglikelihood_tokens([(("", ""), context, part)], disable_tqdm=True)[0] for part in (new[:1], new, other)
    )
    assert is_greedy and not is_not and same <= greedy and worse < same


def test_generated_text_is_generates(tiny_model_dir: Path) -> None:
    lm = ours(tiny_model_dir, memory_tokens=64, chunk_tokens=64)
    request = Instance("generate_until", {}, (PROSE, {"until": [], "max_gen_toks": 8, "do_sample": False}), 0)
    (text,) = lm.generate_until([request], disable_tqdm=True)
    ids = torch.tensor([lm.tok_encode(PROSE)])
    output = lm.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert text == lm.tok_decode(output[0, ids.shape[1] :].tolist())
    assert lm.handle.report is not None and lm.handle.report.memory_tokens == 64


def test_prompts_are_read_whole_or_cut_in_the_middle(tiny_model_dir: Path) -> None:
    # The model's window is 4,096 tokens, to which the harness would cut the beginning off.
    text = PROSE * 12
    request = Instance("generate_until", {}, (text, {"until": [], "max_gen_toks": 2, "do_sample": False}), 0)
    whole = ours(tiny_model_dir, memory_tokens=64, chunk_tokens=512)
    whole.generate_until([request], disable_tqdm=True)
    assert whole.handle.report is not None and whole.handle.report.prompt_tokens == len(text) > 4096
    cut = ours(tiny_model_dir, memory_tokens=64, chunk_tokens=512, max_length=1002)
    cut.generate_until([request], disable_tqdm=True)
    assert cut.handle.report is not None and cut.handle.report.prompt_tokens == 1000
    assert cut_middle(list(range(10)), 5) == [0, 1, 2, 8, 9]
    assert cut_middle([1, 2], 2) == cut_middle([1, 2], None) == [1, 2]
    ids, mask = cut.tok_batch_encode(["abcdef", "ab"], left_truncate_len=4)
    assert cut.tok_decode(ids[0].tolist()) == "abef" and mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]


def test_what_would_run_the_stock_model_is_refused(tiny_model_dir: Path) -> None:
    lm = ours(tiny_model_dir)
    with pytest.raises(UnsupportedCallError, match="loglikelihood_rolling"):
        lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("text",), 0)])
    with pytest.raises(UnsupportedCallError, match="without a cache"):
        lm._model_call(torch.tensor([[1, 2]]))
    with pytest.raises(ConfigError, match="batch_size=auto:4 tries sizes out"):
        ours(tiny_model_dir, batch_size="auto:4")
    with pytest.raises(ConfigError, match="memory_tokens"):
        ours(tiny_model_dir, memory_tokens=1)


def test_sizes_may_be_written_as_on_the_command_line(tiny_model_dir: Path) -> None:
    config = ours(tiny_model_dir, memory_tokens="1k", chunk_tokens="0.5k", observer="window").handle.config
    assert (config.memory_tokens, config.chunk_tokens, config.observer) == (1000, 500, "window")


def test_the_harness_gets_its_arguments_and_our_model() -> None:
    assert harness_arguments(["--tasks", "ruler"]) == ["run", "--model", "imdc", "--tasks", "ruler"]
    assert harness_arguments(["run", "--tasks", "ruler"]) == ["run", "--model", "imdc", "--tasks", "ruler"]
    assert harness_arguments(["run", "--model=imdc"]) == ["run", "--model=imdc"]
    assert harness_arguments(["ls", "tasks"]) == ["ls", "tasks"]
    for given in (["--model", "hf"], ["-M", "hf"], ["run", "--model=hf"]):
        with pytest.raises(ConfigError, match="runs the model imdc, not 'hf'"):
            harness_arguments(given)


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="cannot load a model from '.*none': "):
        ImdcLM(str(tmp_path / "none"), device="cpu")


def test_help_says_where_options_of_imdc_go(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["eval", "--help"])
    shown = capsys.readouterr().out
    assert shown.index("go into --model_args") < shown.index("usage:")


def test_imdc_eval_runs_a_multiple_choice_task(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("datasets")
    # The thousands of task files of the harness need not be read for this one.
    built = TaskManager.__init__
    monkeypatch.setattr(TaskManager, "__init__", functools.partialmethod(built, include_defaults=False))
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    (tmp_path / "questions.json").write_text(
        "".join(json.dumps({"text": PROSE, "choices": ["Yes", "No"], "right": at % 2}) + "\n" for at in range(3))
    )
    (tmp_path / "tiny_choice.yaml").write_text(
        "task: tiny_choice\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {tmp_path / 'questions.json'}\ntest_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: '{{text}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: '{{right}}'\n"
        "metric_list:\n  - metric: acc\n"
    )
    before = list(sys.argv)
    arguments = ["--tasks", "tiny_choice", "--include_path", str(tmp_path), "--device", "cpu"]
    options = f"pretrained={tiny_model_dir},dtype=float32,memory_tokens=64,chunk_tokens=64"
    assert cli.main(["eval", *arguments, "--model_args", options]) == 0
    shown = capsys.readouterr().out
    assert "tiny_choice" in shown and "acc" in shown and "memory_tokens" in shown
    assert sys.argv == before


def test_imdc_eval_names_what_it_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["eval", "--tasks", "ruler"]) == 2
    assert 'needs lm-evaluation-harness: pip install -e ".[bench]"' in capsys.readouterr().err
