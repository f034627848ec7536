"""lm-evaluation-harness and evaluate.py agree on the scores and answers of a checkpoint."""

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import flags, write_rows
from test_scoring import TABLE

import evaluate
import train
from engine.tokenizer import Tokenizer
from grading import rules

TASK = """
include: {gsm8k}
task: gsm8k_local
dataset_path: json
dataset_name: null
dataset_kwargs:
  data_files:
    train: {rows}
    test: {rows}
num_fewshot: 0
"""


# The harness's own code: reads completions, prints the answer and the verdict of each filter.
FILTERS = """
import json, sys, yaml
from lm_eval.api.metrics import exact_match_fn
from lm_eval.filters.extraction import RegexFilter
from lm_eval.models.utils import postprocess_generated_text

task = yaml.safe_load(open(sys.argv[1]))
[metric] = task["metric_list"]
ignore = {key: metric[key] for key in ("regexes_to_ignore", "ignore_case", "ignore_punctuation")}
results = []
for completion, gold in json.load(sys.stdin):
    text = postprocess_generated_text(completion, task["generation_kwargs"]["until"], None)
    for entry in task["filter_list"]:
        settings = {key: value for key, value in entry["filter"][0].items() if key != "function"}
        [[answer]] = RegexFilter(**settings).apply([[text]], [{}])
        references = [f"so\\n#### {gold}"]
        score = exact_match_fn(predictions=[answer], references=references, **ignore)
        results.append([answer, bool(score["exact_match"])])
print(json.dumps(results))
"""


def published_task() -> Path:
    """The harness's own definition of the task. Skips the test if it is not installed."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None:
        pytest.skip("lm_eval is not installed: pip install -r benchmarks/requirements.txt")
    return Path(spec.origin).parent / "tasks" / "gsm8k" / "gsm8k.yaml"


def run(command: list[str], folder: Path, text: str = "") -> str:
    """Run the harness in ``folder``, since it imports another `evaluate` than ours."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(folder / "cache"), "HF_DATASETS_OFFLINE": "1"}
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, input=text
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_the_harness_extracts_the_same_from_hard_completions(tmp_path: Path) -> None:
    """Guards against a filter that differs on unusual completions."""
    rng = random.Random(0)
    pieces = [
        "#### ",
        "####",
        "1",
        "18",
        ",",
        ".",
        "$",
        "%",
        "-",
        "−",
        " ",
        "\n",
        "x",
        "Question:",
        "</s>",
        "<|im_end|>",
    ]
    made = [
        (
            "".join(rng.choices(pieces, k=rng.randrange(1, 14))),
            rng.choice(["1", "18", "1,181", "-1"]),
        )
        for _ in range(3000)
    ]
    work = [*((completion, gold) for completion, gold, _ in TABLE), *made]
    output = run([sys.executable, "-c", FILTERS, str(published_task())], tmp_path, json.dumps(work))
    theirs = json.loads(output.splitlines()[-1])
    right = [0, 0]
    for number, (completion, gold) in enumerate(work):
        ours = [
            [
                rules.extract_lm_eval_strict(completion),
                rules.correct_lm_eval_strict(completion, gold),
            ],
            [
                rules.extract_lm_eval_flexible(completion),
                rules.correct_lm_eval_flexible(completion, gold),
            ],
        ]
        expected = [
            [None if answer == "[invalid]" else answer, verdict]
            for answer, verdict in theirs[2 * number :][:2]
        ]
        assert ours == expected, (completion, gold)
        right = [count + verdict for count, (_, verdict) in zip(right, ours, strict=True)]
    assert min(right) > 20


def test_the_harness_gives_the_same_scores_and_answers(
    call, settings: dict[str, str], make_llama, tokenizer: Tokenizer, problems, tmp_path: Path
) -> None:
    """Guards against a prompt, BOS, stop or filter that differs from the harness's."""
    gsm8k = published_task()
    base = tmp_path / "base"
    make_llama(len(tokenizer), hidden_size=64, intermediate_size=96, std=0.02).save_pretrained(base)
    tokenizer.save(base)
    seen, unseen = problems[:24], problems[24:32]
    write_rows(tmp_path / "data" / "train.jsonl", problems[:30] + problems[40:])
    write_rows(tmp_path / "data" / "test.jsonl", problems[30:40])
    learn = {
        "model": str(base),
        "dataset": str(tmp_path / "data"),
        "epochs": "12",
        "batch_size": "8",
    }
    learn |= {"validation_size": "4", "max_new_tokens": "100", "learning_rate": "5e-3"}
    assert call(train, *flags(settings | learn)).code == 0
    best = Path(settings["output_dir"]) / "test" / "best"
    # Rows that it has learned, so that some answers are right.
    rows = tmp_path / "rows"
    write_rows(rows / "test.jsonl", [*seen, *unseen])
    write_rows(rows / "train.jsonl", problems[40:60])
    outcome = call(
        evaluate, "--ckpt", str(best), "--dataset", str(rows), "--output", str(tmp_path / "ours")
    )
    assert outcome.code == 0, outcome.err
    scores = json.loads((tmp_path / "ours" / "scores.json").read_text())
    ours = [
        json.loads(line)
        for line in (tmp_path / "ours" / "predictions.jsonl").read_text().splitlines()
    ]

    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(
        TASK.format(gsm8k=gsm8k, rows=rows / "test.jsonl")
    )
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "run",
        "--model",
        "hf",
        "--tasks",
        "gsm8k_local",
        "--device",
        "cpu",
    ]
    command += [
        "--model_args",
        f"pretrained={best},dtype=float32",
        "--include_path",
        str(tmp_path / "tasks"),
    ]
    command += ["--gen_kwargs", "max_gen_toks=100", "--batch_size", "1", "--log_samples"]
    command += ["--output_path", str(tmp_path / "theirs")]
    run(command, tmp_path)

    [results] = (tmp_path / "theirs").rglob("results_*.json")
    theirs = json.loads(results.read_text())["results"]["gsm8k_local"]
    assert theirs["exact_match,strict-match"] == pytest.approx(
        scores["rules"]["lm_eval_strict"], abs=1e-12
    )
    assert theirs["exact_match,flexible-extract"] == pytest.approx(
        scores["rules"]["lm_eval_flexible"], abs=1e-12
    )
    assert 0 < scores["rules"]["lm_eval_strict"] < 1

    [samples] = (tmp_path / "theirs").rglob("samples_*.jsonl")
    extract = {
        "strict-match": rules.extract_lm_eval_strict,
        "flexible-extract": rules.extract_lm_eval_flexible,
    }
    correct = {
        "strict-match": rules.correct_lm_eval_strict,
        "flexible-extract": rules.correct_lm_eval_flexible,
    }
    completions = {row["id"]: row for row in ours}
    logged = [json.loads(line) for line in samples.read_text(encoding="utf-8").split("\n") if line]
    assert len(logged) == 2 * len(ours)
    for sample in logged:
        row, rule = completions[sample["doc_id"]], sample["filter"]
        assert sample["doc"]["question"] == row["question"]
        assert sample["filtered_resps"] == [extract[rule](row["completion"]) or "[invalid]"]
        assert sample["exact_match"] == correct[rule](row["completion"], row["gold"])
        if row["stop"] == "eos":
            assert sample["resps"][0][0] == rules.cut_at_stop(row["completion"])
