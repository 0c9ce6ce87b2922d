"""Whatever settings are given, the doctor has an answer that agrees with itself, or says what is wrong with them."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.doctors import cluster, model
from uniap_tune.doctor.diagnosis import diagnose
from uniap_tune.doctor.document import document
from uniap_tune.doctor.reading import Given, read_setup
from uniap_tune.errors import InputError
from uniap_tune.strategy import Target

SETTINGS = {
    "tp": ("1", "2", "4", "8"), "pp": ("1", "2", "3", "4"), "cp": ("1", "2"), "vpp": ("1", "2", "4"), "ep": ("1", "2"),
    "etp": ("1", "2"), "mbs": ("1", "2", "3"), "zero": ("0", "1", "2", "3"), "sp": ("on", "off"),
    "recompute": ("none", "selective", "full", "2"), "overlap": ("on", "off"),
}  # fmt: skip
MODELS = ("gpt2", "llama-2-7b", "llama-3-70b", "mixtral-8x7b")
CLUSTERS = ("1x1:h100", "1x6:a100-80gb", "1x8:a100-40gb", "2x8:h100")


@given(
    name=st.sampled_from(MODELS),
    on=st.sampled_from(CLUSTERS),
    target=st.sampled_from((Target.MEGATRON, Target.DEEPSPEED)),
    batch=st.sampled_from((1, 6, 16, 64)),
    pairs=st.fixed_dictionaries({}, optional={key: st.sampled_from(values) for key, values in SETTINGS.items()}),
)
@settings(max_examples=150)
def test_every_answer_agrees_with_itself(name: str, on: str, target: Target, batch: int, pairs: dict[str, str]) -> None:
    job = Given(cluster=cluster(on), model=model(name), global_batch=batch, seq_length=1024, target=target, pairs=pairs)
    try:
        setup = read_setup(None, job)
    except InputError:
        return
    found = diagnose(setup)
    text = json.dumps(document(found), allow_nan=False)
    assert json.loads(text)["status"] in ("fits", "out_of_memory", "refused")
    assert (found.fits is None) == (not setup.runs)
    if found.fits is None:
        assert found.broken
    else:
        assert found.fits == (min(found.room_bytes) >= 0)
        assert len(found.room_bytes) == int(setup.settings["pp"])
    for change in found.improvements:
        assert change.edits
        assert change.title
        assert change.room_bytes > 0
        assert found.fits is not True or change.gain > 0
