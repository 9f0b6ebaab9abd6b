"""A dry run of `graph_decode`: what graphs keep counts, and Python takes no part in a replay."""

import pytest
import torch
import transformers as tf

import bigkit
from bigkit.dryrun.run import on_machine
from bigkit.dryrun.workload import NotRun, Workload
from bigkit.machine.allocator import replay
from bigkit.machine.hardware import machine_of

AROUND = {"model.embed_tokens": 0, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
PLACES = {
    "one GPU": {"": 0},
    "blocks in RAM": {**AROUND, "model.layers": "cpu"},
    "two GPUs": {**AROUND, **{f"model.layers.{i}": i % 2 for i in range(6)}},
}


def build():
    config = tf.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4, vocab_size=300
    )
    with bigkit.init_empty_weights():
        return tf.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_a_replay_asks_for_little_and_python_for_less(places):
    plain, run = (bigkit.dry_run(build(), places, 1, 8, 6, "2 x H200", graphs=graphs) for graphs in (False, True))
    steps = {name: run.operations[first:last] for (_, first), (name, last) in zip(run.steps, run.steps[1:])}
    names = [[operation.name for operation in steps[f"token {i}"]] for i in range(4, 7)]  # the third is recorded
    assert names[0] == names[1] == names[2] and "mm" in names[0]
    issued = [sum(operation.issued for operation in own) for own in steps.values()]
    assert issued[-1] < issued[0] / 10 and run.times[-1].seconds < plain.times[-1].seconds / 2
    for device, recording in run.recordings.items():
        count = len(run.kinds[device])
        streams = [*recording.streams, *[0] * count][:count]
        assert {*streams} == {0, 1}  # the graph's pool
        curves = replay(recording.events, recording.streams)
        held = [curves.allocated[at - 1] for _, at in recording.marks]
        assert held[-1] == held[-2] == held[-3]
        ends = [at for _, at in recording.marks]
        own = [size for size, pool in zip((event for event in recording.events if event > 0), streams) if pool]
        assert 32 * 2**20 in own  # cuBLAS takes a workspace for each stream, and a graph is recorded on one of its own
        requests = sum(event > 0 for event in recording.events[: ends[-2]])
        assert not any(streams[requests:])  # nothing new comes from the pool in a replay


def test_what_is_refused():
    with pytest.raises(ValueError, match="graphs=True is about generate"):
        Workload(graphs=True, generate=False)
    with pytest.raises(NotRun, match="GPT has no generate of Transformers"):
        bigkit.dry_run("pygpt", 0, new_tokens=2, graphs=True)


def test_on_another_gpu_every_workspace_is_of_its_size():
    """Recordings take workspaces of their own, on the streams that they are made on."""
    options = {"prompt_tokens": 8, "new_tokens": 6, "graphs": True}
    there, here = (bigkit.dry_run(build().float(), hardware=name, **options) for name in ("H200", "RTX 4090"))
    found = on_machine(there, machine_of("RTX 4090"))
    assert found is not None and len(here.workspaces[0]) > 1
    assert found.recordings == here.recordings and found.recordings != there.recordings
