"""A workspace in W&B with the panels of this project's runs: curves, speed, scores and tables.

pip install wandb-workspaces==0.4.13
python docs/wandb_workspace.py --entity ENTITY
python docs/wandb_workspace.py --entity ENTITY --project my-project

It is saved as a new view of the project, and its address is printed. Nothing else is changed.
"""

import argparse
import sys

try:
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces
except ModuleNotFoundError as error:
    print(f"error: {error.name} is missing: pip install wandb-workspaces==0.4.13", file=sys.stderr)
    sys.exit(2)

LOSSES = ("val/loss", "train/loss")
CLASSES = ("reasoning", "equations", "final_answer")
RULES = ("exact_match", "lm_eval_strict", "lm_eval_flexible")
MISTAKES = ("arithmetic", "reasoning", "format", "cut")


def curve(title: str, *names: str) -> reports.LinePlot:
    return reports.LinePlot(title=title, x="step", y=list(names))


SECTIONS = {
    "Validation": [
        curve("loss, in nats a token", *LOSSES),
        curve("perplexity", "val/perplexity"),
        curve("perplexity by class", *(f"val/perplexity_{name}" for name in CLASSES)),
        curve("exact match on the validation rows", "val/exact_match"),
        reports.WeavePanelSummaryTable(table_name="val/samples"),
    ],
    "Test": [
        curve("exact match, by rule", *(f"eval/{name}" for name in RULES)),
        curve("95 % interval", "eval/exact_match_low", "eval/exact_match_high"),
        curve("wrong answers, by kind", *(f"eval/errors_{name}" for name in MISTAKES)),
        reports.WeavePanelSummaryTable(table_name="eval/predictions"),
    ],
    "Training": [
        curve("loss, in nats a token", "train/loss"),
        curve("perplexity", "train/perplexity"),
        curve("learning rate", "train/learning_rate"),
        curve("gradient norm", "train/grad_norm"),
    ],
    "Speed and memory": [
        curve("tokens a second", "train/tokens_per_second"),
        curve("MFU", "train/mfu"),
        curve("memory in GiB", "train/memory_gib"),
    ],
}


def workspace(entity: str, project: str) -> workspaces.Workspace:
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name="Llama-2 on GSM8K",
        sections=[
            workspaces.Section(name=name, panels=panels, is_open=True)
            for name, panels in SECTIONS.items()
        ],
        settings=workspaces.WorkspaceSettings(x_axis="step"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--entity", required=True, help="the user or team that owns the project")
    parser.add_argument("--project", default="llama-2-gsm8k", help="default: that of config.yaml")
    arguments = parser.parse_args()
    try:
        workspace(arguments.entity, arguments.project).save()  # which prints its address
    except Exception as error:  # of W&B or of the network, in many types
        cause = " ".join(str(error).split())
        print(
            f"error: not saved ({cause}): log in with wandb login, and try again", file=sys.stderr
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
