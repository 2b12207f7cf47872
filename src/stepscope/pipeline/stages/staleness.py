"""Which stages have to be done again, because what they read is not what it was when they were done."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepscope.config import Asking, Stage
from stepscope.pipeline.inputs.tasks import OWN, given_by_the_user
from stepscope.pipeline.stages import PLANS
from stepscope.pipeline.stages.plan import Plan
from stepscope.runs import RunFolder, differing_keys, sha256


def needs(stage: Stage) -> list[Stage]:
    """Stages that write what ``stage`` reads, in their order."""
    reads = set(PLANS[stage].reads)
    return [name for name, plan in PLANS.items() if name != stage and reads.intersection(plan.writes)]


def inputs(plan: Plan, provenance: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """What a stage would read now: digests of artifacts and checkpoint, and its keys of the configuration."""
    there = {name: d for record in provenance["stages"].values() for name, d in record["sha256"].items()}
    there |= {name: digests[0] for name, digests in provenance.get("sealed", {}).items()}
    names = [name for name in there if name not in plan.writes] if plan.shows_all else plan.reads
    return {
        "files": {name: there.get(name) for name in sorted(names)},
        "checkpoint": provenance["checkpoint_digest"] if plan.needs_policy else None,
        "config": {key: config[key] for key in plan.config},
        "given": given_files({key: config[key] for key in plan.config}) | _own(plan, config),
    }


def given_files(config: Mapping[str, Any]) -> dict[str, str]:
    """Digests of the files that batches are taken from, by key of the configuration.

    Of a folder, the names and sizes of its files count. A file that is gone has no digest: what was made from
    it stays.
    """
    found = {}
    for key, section in config.items():
        file = section.get("file") if isinstance(section, Mapping) else None
        if file is not None and (path := Path(file)).exists():
            found[f"{key}.file"] = sha256(path) if path.is_file() else _listing(path)
    return found


def _own(plan: Plan, config: Mapping[str, Any]) -> dict[str, str]:
    """Digests of what the user gives of their own, where the stage depends on it."""
    if not set(OWN) <= set(plan.config):
        return {}
    found = given_by_the_user(Asking.model_validate({key: config.get(key) for key in OWN}))
    return {key: digest for key, digest in found.items() if digest}


def _listing(folder: Path) -> str:
    sizes = sorted((file.name, file.stat().st_size) for file in folder.iterdir() if file.is_file())
    return hashlib.sha256(repr(sizes).encode()).hexdigest()


def reason_to_do(run: RunFolder, stage: Stage, config: Mapping[str, Any]) -> str:
    """Why a stage is to be done, or done again, in words; empty where it is finished and not stale."""
    if not run.is_done(stage):
        return "not done"
    plan, provenance = PLANS[stage], run.provenance()
    then = provenance["stages"][stage].get("inputs")
    if then is None:
        return "it is not recorded what it read"
    now = inputs(plan, provenance, config)
    names = dict.fromkeys([*then["files"], *now["files"]])
    changed = [name for name in names if then["files"].get(name) != now["files"].get(name)]
    given, before = now["given"], then.get("given", {})
    changed += [key for key, digest in given.items() if before.get(key, digest) != digest]
    found = [f"{', '.join(changed)} changed"] if changed else []
    if then["checkpoint"] != now["checkpoint"]:
        found.append("the checkpoint changed")
    return "; ".join([*found, *differing_keys(then["config"], now["config"])])
