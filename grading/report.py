"""Scores and comparisons as text for people."""

from typing import Any

from grading.compare import Comparison
from grading.rules import some
from run.errors import one_line


def analysis_table(analysis: dict[str, Any]) -> str:
    """`analyse`'s result as a few lines of text for people."""
    counts = analysis["errors"].items()
    errors = ", ".join(
        f"{label} {'not known' if count is None else count}" for label, count in counts
    )
    disagree = analysis["rules_disagree"]
    lines = [
        f"  wrong, by kind           {errors}",
        f"  rules disagree           {len(disagree):>8}",
    ]
    if disagree:
        lines[-1] += f"   ids {some(disagree)}"
    for name, title in (
        ("by_steps", "by steps of the gold"),
        ("by_question_words", "by words of question"),
    ):
        if counts := analysis[name]:
            shares = ", ".join(
                f"{kind}: {c['num_correct'] / c['num_problems']:.0%}" for kind, c in counts.items()
            )
            lines.append(f"  {title:<25}{shares}")
    return "\n".join(lines)


def comparison_table(result: Comparison, names: tuple[str, str]) -> str:
    """A `Comparison` as a few lines of text for people."""
    total = result.num_problems
    low, high = result.interval
    lines = [f"on the {total} problems in common:"]
    for name, num_correct in zip(names, result.num_correct, strict=True):
        lines.append(f"  {num_correct / total:8.2%}   {num_correct} of {total}   {one_line(name)}")
    lines += [
        f"  difference (second less first)   {result.difference:+.2%}",
        f"  95 % interval                    {low:+.2%} to {high:+.2%}",
        f"  exact paired p-value (McNemar)   {result.p_value:.4g}",
        f"  won {len(result.won)}" + (f": ids {some(result.won)}" if result.won else ""),
        f"  lost {len(result.lost)}" + (f": ids {some(result.lost)}" if result.lost else ""),
    ]
    return "\n".join(lines)


def gain_line(scores: dict[str, Any]) -> str:
    """The score with the calculator beside the one without, for people."""
    counts = f"{scores['num_correct']} of {scores['num_problems']}"
    return (
        f"  with the calculator      {scores['exact_match']:8.2%}   {counts}, "
        f"won {len(scores['won'])}, lost {len(scores['lost'])}, p = {scores['p_value']:.3g}"
    )


def samples_table(scores: dict[str, Any], title: str) -> str:
    """The scores of samples as a few lines of text for people."""
    low, high = scores["ci95"]
    drawn = f" at temperature {scores['temperature']}" if "temperature" in scores else ""
    lines = [f"{title}: {scores['num_samples']} samples a problem{drawn}"]
    lines.append(f"    mean of all             {scores['exact_match']:8.2%}")
    for name, shown in (("maj_at", "maj@"), ("pass_at", "pass@")):
        shares = ", ".join(f"{shown}{k} {share:.2%}" for k, share in scores[name].items())
        lines.append(f"    {shares}")
    lines.append(f"    95 % interval of maj@{scores['num_samples']:<3} {low:8.2%} to {high:.2%}")
    return "\n".join(lines)


def score_table(scores: dict[str, Any], title: str) -> str:
    """The scores as a few lines of text for people."""
    low, high = scores["ci95"]
    names = {
        "openai": "OpenAI (headline)",
        "lm_eval_strict": "lm-eval strict-match",
        "lm_eval_flexible": "lm-eval flexible-extract",
    }
    counts = f"{scores['num_correct']} of {scores['num_problems']}"
    lines = [
        one_line(title),
        f"  exact match              {scores['exact_match']:8.2%}   {counts}",
        f"  95 % interval (Wilson)   {low:8.2%} to {high:.2%}",
        *(f"    {names[name]:<24}{fraction:8.2%}" for name, fraction in scores["rules"].items()),
        _cut_line(scores["stopped_by_length"], scores.get("stop_unknown", 0)),
    ]
    return "\n".join(lines)


def _cut_line(stopped_by_length: int | None, unknown: int) -> str:
    if stopped_by_length is None:
        return "  cut by max_new_tokens   not known: no prediction says why it stopped"
    shown = f"   and not known of {unknown}" if unknown else ""
    return f"  cut by max_new_tokens    {stopped_by_length:>8}{shown}"
