"""The part of a recipe that says what a batch system should give a run. It changes nothing about the result."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from unlearn.recipe_data import Frozen, Positive, Scalar


class ClusterSpec(Frozen):
    """What ``python -m unlearn.submit`` asks Slurm for, per job.

    Without Slurm ``gpus``, ``processes`` and ``parallelism`` count.
    """

    partition: str | None = Field(None, min_length=1, description="Slurm partition; the cluster's own when not given.")
    account: str | None = Field(None, min_length=1, description="Slurm account.")
    qos: str | None = Field(None, min_length=1, description="Slurm quality of service.")
    nodes: Positive = Field(1, description="Machines per job.")
    gpus: Annotated[int, Field(ge=0)] = Field(0, description="GPUs per machine.")
    cpus: Positive = Field(4, description="CPU cores per machine.")
    memory: str | None = Field(
        None, pattern=r"^\d+(\.\d+)?[KMGT]B$", description="Main memory per machine, 32GB; the cluster's own if none."
    )
    time: str | None = Field(
        None,
        pattern=r"^(\d+-)?\d{1,3}:\d{2}(:\d{2})?$",
        description="Longest run before it is stopped and put back in the queue, 4:00:00 or 1-12:00:00.",
    )
    processes: Positive | None = Field(
        None, description="Processes per machine that train and score together; one per GPU when not given."
    )
    parallelism: Positive | None = Field(
        None,
        description="Most jobs at a time; as many as there is room for when not given. --local: as many as there are "
        "GPUs for; without GPUs 1 when not given, and no more than there are cores.",
    )
    requeues: Annotated[int, Field(ge=0)] = Field(
        100, description="How often a job that met its time limit goes back in the queue and goes on from there."
    )
    grace: Annotated[int, Field(ge=10)] = Field(
        120, description="Seconds before the time limit at which a run saves where it is and stops."
    )
    setup: tuple[str, ...] = Field((), description="Shell lines run before a job: modules, environments, variables.")
    extra: dict[str, Scalar] = Field(
        default_factory=dict, description="Further sbatch options by their long names, {constraint: a100}."
    )
