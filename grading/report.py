"""Formats scores and comparisons as text."""

from collections.abc import Mapping, Sequence
from typing import Any

from grading.compare import Comparison
from grading.results import CALCULATOR, SAMPLES
from run.errors import first_few, one_line

RULE_NAMES = {
    "openai": "OpenAI (headline)",
    "lm_eval_strict": "lm-eval strict-match",
    "lm_eval_flexible": "lm-eval flexible-extract",
}

STAGE_NAMES = {
    "drawn": "samples",
    "right": "right",
    "well_formed": "  in the data's format",
    "with_equations": "  with equations",
    "true": "  all equations true",
    "distinct": "  distinct lists of them",
    "kept": "  new for their problem",
}


def evaluation_report(scores: Mapping[str, Any], title: str) -> str:
    """The content of a ``scores.json`` of any kind."""
    if "maj_at" in scores:
        return "\n".join([samples_table(scores, one_line(title)), *effort_lines(scores)])
    parts = [score_table(scores, title), analysis_table(scores)]
    if CALCULATOR in scores:
        parts.append(gain_line(scores[CALCULATOR]))
    if SAMPLES in scores:
        parts.append(samples_table(scores[SAMPLES], "  sampled"))
    return "\n".join(parts)


def score_table(scores: Mapping[str, Any], title: str) -> str:
    """The exact match with its interval, and by every rule."""
    low, high = scores["ci95"]
    counts = f"{scores['num_correct']} of {scores['num_problems']}"
    lines = [
        one_line(title),
        f"  exact match              {scores['exact_match']:8.2%}   {counts}",
        f"  95 % interval (Wilson)   {low:8.2%} to {high:.2%}",
    ]
    lines += [f"    {RULE_NAMES[name]:<24}{share:8.2%}" for name, share in scores["rules"].items()]
    lines.append(_cut_line(scores["stopped_by_length"], scores.get("stop_unknown", 0)))
    return "\n".join(lines)


def _cut_line(stopped_by_length: int | None, unknown: int) -> str:
    if stopped_by_length is None:
        return "  cut by max_new_tokens   unknown: no prediction says why it stopped"
    shown = f"   and unknown for {unknown}" if unknown else ""
    return f"  cut by max_new_tokens    {stopped_by_length:>8}{shown}"


def analysis_table(analysis: Mapping[str, Any]) -> str:
    """The result of `mistakes.analyse`."""
    errors = ", ".join(
        f"{label} {'unknown' if count is None else count}"
        for label, count in analysis["errors"].items()
    )
    disagree = analysis["rules_disagree"]
    shown = f"   ids {first_few(disagree)}" if disagree else ""
    lines = [
        f"  wrong, by kind           {errors}",
        f"  rules disagree           {len(disagree):>8}{shown}",
    ]
    for name, title in (
        ("by_steps", "by steps of the gold"),
        ("by_question_words", "by words of question"),
    ):
        if analysis[name]:
            shares = ", ".join(
                f"{kind}: {count['num_correct'] / count['num_problems']:.0%}"
                for kind, count in analysis[name].items()
            )
            lines.append(f"  {title:<25}{shares}")
    return "\n".join(lines)


def gain_line(scores: Mapping[str, Any]) -> str:
    """The score with the calculator, and its gain over the score without."""
    counts = f"{scores['num_correct']} of {scores['num_problems']}"
    return (
        f"  with the calculator      {scores['exact_match']:8.2%}   {counts}, "
        f"won {len(scores['won'])}, lost {len(scores['lost'])}, p = {scores['p_value']:.3g}"
    )


def samples_table(scores: Mapping[str, Any], title: str) -> str:
    """The scores of several samples per problem."""
    low, high = scores["ci95"]
    temperature = f" at temperature {scores['temperature']}" if "temperature" in scores else ""
    how = ", with the calculator" if scores.get("with_calculator") else ""
    lines = [
        f"{title}: {scores['num_samples']} samples per problem{temperature}{how}",
        f"    mean of all             {scores['exact_match']:8.2%}",
    ]
    for name, shown in (("maj_at", "maj@"), ("pass_at", "pass@")):
        shares = ", ".join(f"{shown}{k} {share:.2%}" for k, share in scores[name].items())
        lines.append(f"    {shares}")
    lines.append(f"    95 % interval of maj@{scores['num_samples']:<3} {low:8.2%} to {high:.2%}")
    return "\n".join(lines)


def effort_lines(scores: Mapping[str, Any]) -> list[str]:
    """What sampling took: the tokens of all samples, and the time of the last decoding."""
    lines = []
    if "num_tokens" in scores:
        lines.append(f"    tokens of all samples  {scores['num_tokens']:>9,}")
    if {"seconds", "tokens_per_second"} <= scores.keys():
        lines.append(
            f"    last decoding took     {scores['seconds']:>9,.1f} s at "
            f"{scores['tokens_per_second']:,.1f} tokens per second"
        )
    return lines


def augmentation_table(description: Mapping[str, Any]) -> str:
    """The content of an ``augment.json``."""
    total, num_problems = description["total"], description["num_problems"]
    lines = [f"{description['num_sampled']} of {num_problems} train problems are sampled"]
    for source in description["samples"]:
        kind = "greedy or unknown" if source["temperature"] is None else source["temperature"]
        kept = f"{source['kept']:,} of {source['drawn']:,} kept"
        lines.append(f"  temperature {kind}: {kept}   {one_line(source['file'])}")
    if len({source["temperature"] for source in description["samples"]}) > 1:
        lines.append("  the files differ in their temperature")
    for name, title in STAGE_NAMES.items():
        share = total[name] / total["drawn"]
        lines.append(f"  {title:<25}{total[name]:>9,}   {share:7.2%}")
    original, added = description["rows"]["original"], description["rows"]["added"]
    lines += [
        f"  lists of equations       {description['lists_per_problem']:>9.2f}   per problem, with "
        "the row's own",
        f"  train rows               {original + added:>9,}   {original:,} original, {added:,} new",
        f"  problems by kept samples {_grouped(description['problems_by_kept'])}",
    ]
    return "\n".join(lines)


def _grouped(problems_by_kept: Mapping[str, int]) -> str:
    """Counts of 0, 1, 2, 3-4, 5-8, ... kept samples."""
    groups: dict[str, int] = {}
    for kept, count in problems_by_kept.items():
        high = 1 << max(int(kept) - 1, 0).bit_length() if int(kept) else 0
        name = f"{high // 2 + 1}-{high}" if high > 2 else str(high)
        groups[name] = groups.get(name, 0) + count
    return ", ".join(f"{name}: {count:,}" for name, count in groups.items())


def comparison_table(result: Comparison, names: Sequence[str]) -> str:
    """Both scores, their difference with its interval, and the p-value."""
    total = result.num_problems
    low, high = result.interval
    lines = [f"on the {total} problems in common:"]
    for name, num_correct in zip(names, result.num_correct, strict=True):
        lines.append(f"  {num_correct / total:8.2%}   {num_correct} of {total}   {one_line(name)}")
    lines += [
        f"  difference (second minus first)  {result.difference:+.2%}",
        f"  95 % interval                    {low:+.2%} to {high:+.2%}",
        f"  exact paired p-value (McNemar)   {result.p_value:.4g}",
        _changed_line("won", result.won),
        _changed_line("lost", result.lost),
    ]
    return "\n".join(lines)


def _changed_line(name: str, ids: Sequence[int]) -> str:
    return f"  {name} {len(ids)}" + (f": ids {first_few(ids)}" if ids else "")
