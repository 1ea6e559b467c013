"""imdc as a model of lm-evaluation-harness, so that any of its tasks can be run with a bounded memory.

Importing this registers the model "imdc". It differs from the harness's "hf" in three things: the model is patched;
prompts that are too long are cut in the middle, and only where `max_length` asks for it (the harness cuts the beginning
off); and log-likelihoods, for which the harness calls the model without a cache, are read through an imdc cache.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

import imdc
from imdc.config import option_names, resolve_config
from imdc.errors import ConfigError, UnsupportedCallError
from imdc.model.loading import LoadError, load_model
from imdc.units import parse_tokens

# The harness takes None for the model's own window and cuts prompts to it; imdc reads past the window.
_UNBOUNDED = 2**31 - 1

Request = tuple[tuple[str, str], list[int], list[int]]


@register_model("imdc")
class ImdcLM(HFLM):  # type: ignore[misc]
    """`HFLM` whose model is patched by imdc.

    Attributes:
        handle: of the patch; its `report` tells of the last prompt.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        gguf_file: str | None = None,
        dtype: Any = "auto",
        max_length: int | None = None,
        batch_size: int | str | None = 1,
        **options: Any,
    ) -> None:
        """Load and patch.

        Args:
            pretrained: folder, hub id, .gguf file, or a model that is loaded already (with `tokenizer`).
            gguf_file: name of a GGUF file inside `pretrained`.
            dtype: of the weights.
            max_length: tokens of prompt and answer together beyond which the prompt's middle is left out; None reads
                every prompt whole.
            batch_size: rows per generate() call; a number.
            options: fields of `PrefillConfig` such as memory_tokens=2048, and what `HFLM` takes.

        Raises:
            ConfigError: an option is unknown to both or has a wrong value.
            LoadError: the model cannot be loaded.
        """
        if str(batch_size).startswith("auto"):
            raise ConfigError(f"batch_size={batch_size} tries sizes out with calls that have no cache; give a number")
        ours = {name: _value(name, options.pop(name)) for name in option_names() if name in options}
        config = resolve_config(None, **ours)
        if isinstance(pretrained, str) and (gguf_file is not None or pretrained.lower().endswith(".gguf")):
            device = options.pop("device", None)
            pretrained, tokenizer = load_model(pretrained, gguf_file=gguf_file, dtype=dtype, device=_device(device))
            options.setdefault("tokenizer", tokenizer)
        try:
            super().__init__(
                pretrained,
                dtype=dtype,
                max_length=_UNBOUNDED if max_length is None else int(max_length),
                batch_size=batch_size,
                backend="causal",
                **options,
            )
        except OSError as error:
            raise LoadError(f"cannot load a model from {pretrained!r}: {str(error).strip().splitlines()[0]}") from error
        self.handle = imdc.patch(self.model, config)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask [rows, tokens]; prompts beyond `left_truncate_len` lose their middle."""
        rows = [cut_middle(self.tok_encode(text), left_truncate_len) for text in strings]
        padded = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
        return padded["input_ids"], padded["attention_mask"]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Refuse perplexity: it scores every token of a text, and imdc reads texts without logits.

        Raises:
            UnsupportedCallError: always.
        """
        raise UnsupportedCallError(
            "tasks of output_type loglikelihood_rolling (perplexity) have no prompt to read in bounded memory; run "
            "them with --model hf of lm-eval"
        )

    def _model_call(self, *args: Any, **kwargs: Any) -> Tensor:
        """Refuse what would run the unpatched model under imdc's name."""
        raise UnsupportedCallError("the harness calls the model without a cache, where nothing would be compressed")

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy decoding gives it; a context is read once."""
        from tqdm import tqdm

        by_context: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            room = self.max_length - len(continuation)
            by_context[tuple(cut_middle(context, room))].append(index)
        found: dict[int, tuple[float, bool]] = {}
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")
        for prompt, indices in by_context.items():
            scores = score_continuations(self.handle, self.model, prompt, [requests[index][2] for index in indices])
            for index, score in zip(indices, scores, strict=True):
                found[index] = score
                if requests[index][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], score)
            bar.update(len(indices))
        bar.close()
        return [found[index] for index in range(len(requests))]


def cut_middle(ids: list[int], length: int | None) -> list[int]:
    """`ids` without its middle where it has more than `length` tokens: the beginning and the end matter most."""
    if length is None or len(ids) <= length:
        return ids
    half = length // 2
    return ids[: length - half] + ids[len(ids) - half :]


@torch.no_grad()
def score_continuations(
    handle: Any, model: Any, context: Sequence[int], continuations: Sequence[Sequence[int]]
) -> list[tuple[float, bool]]:
    """Read `context` once through imdc, and score each continuation from a copy of what is kept of it.

    Returns:
        Per continuation the natural log of its probability, and whether each of its tokens is the likeliest.
    """
    cache = handle.new_cache()
    ids = torch.tensor([list(context)], device=model.device)
    first = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:]
    scores = []
    for continuation in continuations:
        wanted = torch.tensor([list(continuation)], device=model.device)
        logits = first
        if wanted.shape[1] > 1:
            rest = model(wanted[:, :-1], past_key_values=cache.copy()).logits
            logits = torch.cat((first, rest), dim=1)
        logs = torch.log_softmax(logits.float(), dim=-1)
        likeliest = bool((logs.argmax(dim=-1) == wanted).all())
        scores.append((float(logs.gather(2, wanted[..., None]).sum()), likeliest))
    return scores


def _value(name: str, value: Any) -> Any:
    """A value of `--model_args`, where "4k" arrives as a text."""
    return (
        parse_tokens(value, name) if name.endswith("_tokens") and isinstance(value, str) and value != "auto" else value
    )


def _device(name: str | None) -> str | None:
    # lm-eval's own default, on machines without one.
    return None if name is not None and name.startswith("cuda") and not torch.cuda.is_available() else name
