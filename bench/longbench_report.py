"""What a run shows: its results as one dictionary, as Markdown, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from longbench_data import Record
from longbench_scores import CLOCKS, base_ways, buckets, costs, lines
from longbench_tasks import Task
from longbench_ways import FULL, Way

from imdc.units import format_bytes

Results = dict[str, Any]


def summarize(
    samples: Sequence[dict[str, Any]],
    tasks: Sequence[Task],
    ways: Sequence[Way],
    records: Sequence[Record],
    seed: int,
) -> Results:
    """Everything below the answers themselves, ready for JSON: what all the other views are made of."""
    reworded = sorted({record.task.name for record in records if not record.official})
    return {
        "ways": {
            way.name: {
                "key": way.key,
                "schedule": way.schedule,
                "observer": way.observer,
                "memory": way.memory.words if way.memory else None,
                "chunk": way.chunk.words if way.chunk else None,
                "knows_the_question": way.aware,
            }
            for way in ways
        },
        "bases": base_ways(ways),
        "answers": len(samples),
        "answers_wanted": len(records) * len(ways),
        "failed": [
            {
                "way": s["way"],
                "task": s["task"],
                "id": s["id"],
                "prompt_tokens": s["prompt_tokens"],
                "error": s["error"],
            }
            for s in samples
            if "error" in s
        ],
        "reworded_tasks": reworded,
        "lines": [asdict(line) for line in lines(samples, tasks, ways, seed)],
        "buckets": buckets(samples, tasks, ways),
        "costs": costs(samples, ways),
    }


def heading(settings: dict[str, Any]) -> str:
    """One line that names the benchmark, the model and the protocol."""
    which = "LongBench-E" if settings["extended"] else "LongBench"
    return f"{which} ({settings['data']}), {settings['model']}, {settings['protocol']}"


def notes(results: Results, settings: dict[str, Any]) -> list[str]:
    """What a reader of the table must know, one sentence each."""
    if settings["protocol"] == "official":
        said = [f"Prompts are cut in the middle to {settings['max_length']:,} tokens, as LongBench's own code does it."]
    else:
        said = ["Prompts are not truncated: the official protocol cuts them to the model's window."]
    wanted, got = results["answers_wanted"], results["answers"]
    if got < wanted:
        said.append(f"Not finished: {got:,} of {wanted:,} answers.")
    least, most = results.get("min_prompt_tokens", 1), results.get("max_prompt_tokens")
    skipped = results.get("skipped", [])
    short = [one for one in skipped if one["prompt_tokens"] < least]
    long = [one for one in skipped if one["prompt_tokens"] >= least]
    for which, limit, left_out in (("shorter", least, short), ("longer", most, long)):
        if left_out:
            named = ", ".join(f"{one['task']} {one['id']} ({one['prompt_tokens']:,})" for one in left_out)
            said.append(f"Left out as {which} than {limit:,} tokens: {named}.")
    if results["failed"]:
        named = ", ".join(f"{one['way']} {one['task']} {one['id']}" for one in results["failed"])
        said.append(f"Out of memory, without a score: {named}.")
    if results["reworded_tasks"]:
        said.append(f"Prompts worded otherwise than LongBench's: {', '.join(results['reworded_tasks'])}.")
    window = settings.get("window")
    beyond = results.get("beyond_window", 0)
    if window and beyond:
        said.append(f"{beyond:,} prompts are longer than the model's window of {window:,} tokens.")
    said.append(
        "Brackets hold 95% intervals: records drawn anew within each task, so a task of one record adds no width; "
        "ratios are over the records that both have answered."
    )
    return said


def markdown(results: Results, settings: dict[str, Any]) -> str:
    """The tables as a Markdown file."""
    parts = [f"# {heading(settings)}", "\n".join(f"- {note}" for note in notes(results, settings))]
    parts.append(_ways_table(results))
    for title, rows in tables(results):
        parts += [f"## {title}", _grid(rows)]
    return "\n\n".join(parts) + "\n"


def tables(results: Results) -> list[tuple[str, list[list[str]]]]:
    """Title and rows (headings first) of every table."""
    names = list(results["ways"])
    body = results["lines"]
    found = [
        (
            "Scores",
            [["", *names, "records"], *([line["label"], *_cells(line["scores"], names), _most(line)] for line in body)],
        )
    ]
    for base in results["bases"]:
        others = [name for name in names if name != base]
        rows = [[line["label"], *_cells(line["against"][base], others, "{:.3f}")] for line in body]
        found.append((f"Share of the score of {base}", [["", *others], *rows]))
    found.append(("Time and memory", _costs_rows(results)))
    if results["buckets"]:
        rows = [
            [row["task"], row["bucket"], *("" if (s := row["scores"][name]) is None else f"{s:.2f}" for name in names)]
            for row in results["buckets"]
        ]
        found.append(("Scores by length", [["task", "words", *names], *rows]))
    return found


def draw(results: Results, settings: dict[str, Any], samples: Sequence[dict[str, Any]], path: Path) -> None:
    """Average score with intervals, and time to the first token over the prompt's length, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    figure.suptitle(heading(settings))
    average = next((line for line in results["lines"] if line["kind"] == "average"), None)
    for at, (name, way) in enumerate(results["ways"].items()):
        color = f"C{at}"
        cell = average["scores"][name] if average is not None else None
        if cell is not None:
            error = [[max(0.0, cell["value"] - cell["low"])], [max(0.0, cell["high"] - cell["value"])]]
            left.bar(at, cell["value"], yerr=error, capsize=4, color=color)
        own = sorted(
            (s["prompt_tokens"], s["ttft_seconds"]) for s in samples if s["key"] == way["key"] and "error" not in s
        )
        right.plot(
            [tokens for tokens, _ in own], [seconds for _, seconds in own], "o-", color=color, ms=3, lw=0.8, label=name
        )
    left.set_xticks(range(len(results["ways"])), list(results["ways"]), rotation=20)
    left.set_ylabel("score, mean of all tasks")
    right.set(xlabel="prompt tokens", ylabel="seconds to the first token")
    right.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _ways_table(results: Results) -> str:
    rows = [["way", "knows the question", "memory", "chunk"]]
    for name, way in results["ways"].items():
        known = "yes" if way["knows_the_question"] else "no"
        if way["schedule"] == FULL:
            rows.append([name, known, "all (unpatched model)", ""])
        else:
            rows.append([name, known, way["memory"], way["chunk"]])
    return _grid(rows)


def _costs_rows(results: Results) -> list[list[str]]:
    bases = results["bases"]
    kind = next((cost["peak_kind"] for cost in results["costs"].values() if cost["peak_kind"]), "")
    # Where the model runs on the processor, its time is what compares: other work slows the clock on the wall.
    on_cpu = kind == "resident"
    clock = CLOCKS[1] if on_cpu else CLOCKS[0]
    rows = [
        ["", "time to first token, median", *(["of the processor, median"] if on_cpu else []),
         *(f"total, share of {base}" for base in bases),
         "decoding, tokens/s, median", f"peak memory above weights ({kind}), median", "most", "KV cache, most",
         "failed"]
    ]  # fmt: skip
    for name, cost in results["costs"].items():
        ratios = [cost[f"{clock} against {base}"] for base in bases]
        rows.append(
            [
                name,
                _shown(cost["ttft_seconds_median"], "{:.2f} s"),
                *([_shown(cost["ttft_cpu_seconds_median"], "{:.2f} s")] if on_cpu else []),
                *(_shown(ratio, "{:.2f}") for ratio in ratios),
                _shown(cost["decode_tokens_per_second_median"], "{:.1f}"),
                *(
                    "" if cost[key] is None else format_bytes(cost[key])
                    for key in ("peak_bytes_median", "peak_bytes_most", "kv_bytes_most")
                ),
                str(cost["failed"]),
            ]
        )
    return rows


def _cells(by_way: dict[str, Any], names: Sequence[str], form: str = "{:.2f}") -> list[str]:
    return [_cell(by_way.get(name), form) for name in names]


def _cell(cell: dict[str, Any] | None, form: str) -> str:
    if cell is None:
        return ""
    return f"{form.format(cell['value'])} [{form.format(cell['low'])}, {form.format(cell['high'])}]"


def _most(line: dict[str, Any]) -> str:
    counts = sorted({cell["count"] for cell in line["scores"].values() if cell is not None})
    return str(counts[0]) if len(counts) == 1 else "-".join(map(str, (counts[0], counts[-1]))) if counts else "0"


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _grid(rows: list[list[str]]) -> str:
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---", *["---:"] * (len(head) - 1)], *body))
