"""Two commands for each verb, which end its help; ``tests/test_cli.py`` gives every one of them."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, str]] = {
    "demo": (
        "stepscope demo",
        "stepscope demo --out runs/small train.rl.steps=20 --open",
    ),
    "train": (
        "stepscope train configs/reasoning_smollm2.yaml --out runs/sums",
        "stepscope train configs/gsm8k_smollm2.yaml rl.steps=20 rl.record.state_every=5 --dry-run",
    ),
    "eval": (
        "stepscope eval runs/demo --open",
        'stepscope eval out --task gsm8k --resume "temperatures=[0.6,1]" num_prompts=256',
    ),
    "measure": (
        "stepscope measure runs/demo/checkpoints/step-30 --open",
        "stepscope measure out/checkpoint-500 --task gsm8k --quantity entropy,reward --quick",
    ),
    "explain": (
        "stepscope explain runs/demo/checkpoints/step-60",
        "stepscope explain out/checkpoint-500 --task gsm8k --minutes 20 --out runs/why",
    ),
    "study": (
        "stepscope study configs/study.yaml --out runs/study",
        "stepscope study configs/study.yaml --executor slurm slurm.partition=gpu slurm.gpus=1 slurm.time=120",
    ),
    "ledger": (
        "stepscope ledger runs/mine --every 5 --quantity entropy,reward --open",
        'stepscope ledger runs/mine --without "quadrant=wrong, rare" --dose 0.5,1',
    ),
    "report": (
        "stepscope report runs/demo --open",
        "stepscope report runs/demo/measure/step-10 runs/demo/measure/step-60",
    ),
    "export": (
        "stepscope export runs/demo/measure/step-60 --to inspect",
        "stepscope export runs/demo --to inspect --out logs",
    ),
    "check": (
        "stepscope check out/checkpoint-500 --task gsm8k",
        "stepscope check configs/measure.yaml",
    ),
    "convert": (
        "stepscope convert out/global_step_100 out/plain",
        "stepscope convert out/checkpoint-500 out/for-vllm --merged",
    ),
}


def epilog(verb: str) -> str:
    """The end of a verb's help; the first line keeps click from wrapping the others."""
    return "\n".join(["\b", "Examples:", *(f"  {command}" for command in EXAMPLES[verb])])
