"""What a run is known by: every setting counts, or says why it does not."""

import dataclasses

from lora_lite.lab import identity
from lora_lite.lab.studies.records import Fingerprints, JobConfig
from lora_lite.lab.studies.study import Study
from lora_lite.lab.training.config import RunConfig
from lora_lite.lab.training.progress import TrainConfig


def names(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def test_every_setting_of_a_study_counts_or_says_why_not() -> None:
    of_jobs = set(identity.JOB) - {"kind", "device"}  # of the job, and of the machine
    assert of_jobs.isdisjoint(identity.STUDY) and of_jobs | set(identity.STUDY) == names(Study)


def test_what_does_not_count_are_settings_with_a_reason() -> None:
    for table, cls in ((identity.RUN, RunConfig), (identity.TRAINING, TrainConfig), (identity.STUDY, Study)):
        assert table.keys() <= names(cls) and all(table.values())


def test_the_table_of_a_jobs_configuration_is_its_record() -> None:
    assert set(identity.JOB) | {"prints"} == set(JobConfig.__annotations__)
    assert list(identity.DATA) == list(Fingerprints.__annotations__)
    optional = {key for key, kinds in identity.JOB.items() if set(kinds) != set(identity.KINDS)}
    assert JobConfig.__optional_keys__ == optional
