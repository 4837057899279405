"""Every feature on the architectures of other libraries: a test for each cell of a table.

Architectures beyond the dozen of the main suite are marked slow.
"""

import copy
import functools
import os
import re
import subprocess
import sys

import pytest
import torch
import zoo_run
from reference import written_out
from torch.nn.modules.batchnorm import _BatchNorm
from toys import train
from zoo import DOZEN, NO_BLOCKS, ROWS, TIMM, TRANSFORMERS, ZOO, build, loss_of, output_of
from zoo_run import Trained, merging, numbers

from tying.callbacks import (
    GeneratedWeights,
    HardTying,
    LowRankWeights,
    RandomState,
    SoftTying,
    WeightClustering,
    WeightHashing,
)
from tying.depth import StochasticDepth, apply_merge, loop, remove_merge, unloop
from tying.depth.stages import find_stages
from tying.errors import ConfigurationError
from tying.hard import bake, untie
from tying.selection.patterns import Pattern
from tying.soft import fisher_diagonal
from tying.weights.derived import derived_weights, remove

MERGED = [name for name in ZOO if name not in NO_BLOCKS]
MERGES = ("batch", "row", "subset", "keep 1", "keep 0", "evaluation", "removal")
GENERATING = [name for name in TRANSFORMERS if name not in ("BERT", "ViT")]
GREEDY = {"max_new_tokens": 5, "do_sample": False}
NO_SUBSET = {"eva02_tiny_patch14_224": "rope of blocks.0 (EvaBlock), which has no row for each of 6 samples"}
NO_CHECKPOINTING = ("mixer",)
LOOPS = {"loop": None, "loop, norms": "norm", "loop, scales": "scale"}
SLOW_COLUMNS = ("loop, norms", "loop, scales", "loop, checkpointing")
NO_NORMS = {"nfnet_f0": "contain no normalisation layer"}
WHOLE = {
    "hashed": lambda: WeightHashing(["net.**"], 0.5),
    "low rank": lambda: LowRankWeights(["net.**"], rank=2),
    "clustered": lambda: WeightClustering(["net.**"], clusters=4),
    "generated": lambda: GeneratedWeights(["net.**"], embedding=4),
}


def cell(name, column):
    marks = [pytest.mark.slow] * (name not in DOZEN or column in SLOW_COLUMNS)
    if name == "poolformerv2_s12":
        marks.append(pytest.mark.filterwarnings("ignore:stages.*does not add its input"))  # it adds a multiple
    return pytest.param(name, column, id=f"{name}-{column}", marks=marks)


def cells(names, *columns):
    """Parametrise a test by cells of the table, whose rows are architectures."""
    return pytest.mark.parametrize(("name", "column"), [cell(name, column) for name in names for column in columns])


@pytest.fixture(autouse=True)
def _cell(request, record_property):
    arguments = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if "column" in arguments:
        record_property("cell", ("zoo", arguments["column"], arguments["name"]))


built = functools.cache(build)


def plain(name):
    return copy.deepcopy(built(name))


@functools.cache
def inputs(name):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return ZOO[name].inputs()


def blocks_of(model, name):
    """Return the blocks that the architecture's pattern matches, by name."""
    texts = [ZOO[name].blocks] if isinstance(ZOO[name].blocks, str) else ZOO[name].blocks
    return {
        path: module
        for path, module in model.named_modules()
        if any(Pattern(text).match(path) is not None for text in texts)
    }


def merged(name, keep, whole=False, **options):
    model = plain(name)
    count = apply_merge(model, ZOO[name].blocks, StochasticDepth(keep, **options), whole=whole)
    assert count == len(blocks_of(model, name)) > 0
    return model


def without(name, blocks):
    """Return the architecture after blocks were taken out of their containers."""
    model = plain(name)
    for path in blocks:
        container, _, child = path.rpartition(".")
        del model.get_submodule(container)._modules[child]
    if name == "Gemma2":  # its layers attend in two ways, by their index
        kinds = enumerate(model.config.layer_types)
        model.config.layer_types = [kind for layer, kind in kinds if f"model.layers.{layer}" not in blocks]
        model.config.use_cache = False
    return model


def step(model, name, seed=0):
    """Return the output of a training step, its gradients, and the buffers after it."""
    torch.manual_seed(seed)
    model.zero_grad()
    output = output_of(model, inputs(name))
    loss_of(output).backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    return output.detach(), gradients, dict(model.named_buffers())


@torch.no_grad()
def evaluated(model, name):
    return output_of(model.eval(), inputs(name))


def assert_equal(actual, expected):
    """Fail unless tensors, or collections of them, are bitwise equal."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def assert_same_step(actual, expected):
    """Fail unless outputs and gradients are equal; all gradients that the expected step lacks must be zero."""
    (output, gradients, _), (wanted, kept, _) = actual, expected
    assert_equal(output, wanted)
    zeros = {key: torch.zeros_like(gradient) for key, gradient in gradients.items()}
    assert_equal(gradients, zeros | {key: gradient for key, gradient in kept.items() if gradient is not None})


def skipped_blocks(model, name, gradients):
    """Return the names of blocks all whose gradients are zero."""
    return [
        block
        for block in blocks_of(model, name)
        if not any(gradient.any() for key, gradient in gradients.items() if key.startswith(f"{block}."))
    ]


def frozen_norms(model):
    """Let batch norms use their running statistics, which do not depend on the other samples."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    return model


@cells(MERGED, "batch")
def test_batch_mode_leaves_out_whole_blocks(name, column):
    model, counts = merged(name, 0.5, whole=True), set()
    for seed in range(6):
        result = step(model, name, seed)
        skipped = skipped_blocks(model, name, result[1])
        assert_same_step(result, step(without(name, skipped), name))
        counts.add(len(skipped))
    assert len(counts) > 1


@cells(MERGED, "row")
def test_row_mode_masks_samples(name, column, monkeypatch):
    even = torch.arange(ROWS) % 2 == 0

    def kept_rows(keep, shape, device):
        return even.repeat_interleave(shape[0] // ROWS)  # mobilevit's blocks have a row for each pixel of a patch

    monkeypatch.setattr(sys.modules["tying.depth.stochastic_depth"], "keep_mask", kept_rows)
    model = merged(name, 0.5, mode="row")
    output, gradients, _ = step(frozen_norms(model), name)
    shallow = without(name, blocks_of(model, name))
    kept, dropped = (step(frozen_norms(reference), name)[0] for reference in (plain(name), shallow))
    torch.testing.assert_close(output, torch.where(even.view(-1, *[1] * (output.ndim - 1)), kept, dropped))
    assert not torch.equal(kept, dropped)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@cells(MERGED, "subset")
def test_subset_mode_computes_what_row_mode_masks(name, column, record_property):
    models = [frozen_norms(merged(name, 0.5, mode=mode)) for mode in ("subset", "row")]
    if reason := NO_SUBSET.get(name):
        with pytest.raises(ConfigurationError, match=re.escape(reason)):
            output_of(models[0], inputs(name))
        record_property("remark", f"refused: {reason}")
        return
    (output, gradients, _), (expected, masked, _) = (step(model, name) for model in models)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradients, masked)


@cells(MERGED, "keep 1")
def test_keep_1_is_the_plain_model(name, column):
    expected = plain(name)
    results = [*step(expected, name), evaluated(expected, name)]
    for scale in ("test", "train"):
        model = merged(name, 1.0, scale=scale)
        assert_equal([*step(model, name), evaluated(model, name)], results)


@cells(MERGED, "keep 0")
def test_keep_0_is_the_model_without_its_blocks(name, column):
    model = merged(name, 0.0)
    shallow = without(name, blocks_of(model, name))
    assert_same_step(step(model, name), step(shallow, name))
    assert_equal(evaluated(model, name), evaluated(shallow, name))


@cells(MERGED, "evaluation")
def test_evaluation_with_scale_train_is_the_plain_models(name, column):
    assert_equal(evaluated(merged(name, 0.5, scale="train"), name), evaluated(plain(name), name))


@cells(MERGED, "removal")
def test_removal_restores_the_model(name, column):
    model, expected = merged(name, 0.5), plain(name)
    assert_equal(dict(model.state_dict()), dict(expected.state_dict()))
    assert_equal(dict(bake(model)), dict(expected.state_dict()))
    assert remove_merge(model) == len(blocks_of(model, name))
    for restored, original in zip(model.modules(), expected.modules(), strict=True):
        assert type(restored) is type(original)
        assert restored.__dict__.keys() == original.__dict__.keys()
    for actual, wanted in zip(step(model, name), step(expected, name), strict=True):
        assert_equal(actual, wanted)


@cells(NO_BLOCKS, *MERGES)
def test_architectures_without_blocks(name, column, record_property):
    with pytest.raises(ConfigurationError, match=r"is called without a tensor|has no parameters"):
        output_of(merged(name, 0.5), inputs(name))
    record_property("remark", f"refused: {NO_BLOCKS[name]}")


def enable_checkpointing(model, name):
    """Let the library recompute blocks in backward."""
    if name in TIMM:
        model.set_grad_checkpointing()
    else:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # newer name first


@cells([*TIMM, *TRANSFORMERS], "checkpointing")
def test_gradient_checkpointing(name, column, record_property):
    model = merged(name, 0.5, whole=True)
    if name in NO_CHECKPOINTING:
        with pytest.raises(AssertionError, match="gradient checkpointing not supported"):
            enable_checkpointing(model, name)
        record_property("remark", "timm has none")
        return
    enable_checkpointing(model, name)
    for seed in range(2):
        result = step(model, name, seed)
        shallow = without(name, skipped_blocks(model, name, result[1]))
        enable_checkpointing(shallow, name)
        assert_same_step(result, step(shallow, name))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch, at a graph break
@cells(DOZEN, "compile")
def test_compiled_models_draw_alike(name, column):
    model, compiled = merged(name, 0.5), merged(name, 0.5)
    compiled.compile(backend="eager")
    assert_equal(step(compiled, name)[:2], step(model, name)[:2])


@cells(DOZEN, "export")
def test_export_in_evaluation(name, column):
    model = merged(name, 0.5).eval()
    arguments = {**inputs(name), **({"use_cache": False} if name in GENERATING else {})}  # no cache of tensors
    program = torch.export.export(model, (), arguments)
    torch.testing.assert_close(output_of(program.module(), arguments).detach(), evaluated(model, name))


@cells(DOZEN, "resume")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
def test_a_resumed_run_ends_with_the_same_weights(name, column):
    weights = []
    for stops in ([2], [1, 2]):
        for epochs in stops:
            torch.manual_seed(0)
            module, path = Trained(name), "last.ckpt" if epochs > stops[0] else None
            callbacks = [merging(name), RandomState()]
            trainer = train(module, callbacks, data=numbers(), max_epochs=epochs, ckpt_path=path)
            trainer.save_checkpoint("last.ckpt")
        weights.append(module.state_dict())
    assert_equal(*weights)


@pytest.mark.filterwarnings("ignore:lower_rank leaves out")
@cells(ZOO, *WHOLE)
def test_whole_models_have_computed_weights(name, column):
    module, expected = Trained(name), plain(name)
    trainer = train(module, [WHOLE[column]()], data=numbers(), fast_dev_run=2)
    assert trainer.global_step == 2
    assert derived_weights(module)
    assert sum(p.numel() for p in module.parameters()) < sum(p.numel() for p in expected.parameters())
    expected.load_state_dict(bake(module.net))
    output = evaluated(expected, name)
    torch.testing.assert_close(evaluated(module.net, name), output)  # equal weights lie elsewhere in memory
    for weight in derived_weights(module.net):
        remove(module.net, weight)
    assert [*module.net.state_dict()] == [*expected.state_dict()]
    assert len([*module.net.parameters()]) == len([*expected.parameters()])
    assert_equal(evaluated(module.net, name), output)


@cells(ZOO, "soft ties", "hard ties")
def test_ties_over_equal_layers(name, column):
    first, second = ZOO[name].equal
    tie = f"net.{first} ~ net.{second}"
    module, expected = Trained(name), plain(name)
    train(module, [SoftTying([tie], 1e-3) if column == "soft ties" else HardTying([tie])], data=numbers(), max_epochs=1)
    pairs = zip(*(module.net.get_submodule(layer).parameters() for layer in ZOO[name].equal), strict=True)
    assert all((one is other) == (column == "hard ties") for one, other in pairs)
    expected.load_state_dict(bake(module.net))
    assert_equal(evaluated(module.net, name), evaluated(expected, name))
    count = len([*expected.get_submodule(first).parameters()])
    assert untie(module) == (count if column == "hard ties" else 0)
    assert_equal(evaluated(module.net, name), evaluated(expected, name))


@cells(MERGED, *LOOPS)
def test_loops_are_the_repeats_written_out(name, column, record_property):
    model, expected = plain(name), plain(name)
    stages = find_stages(model, ZOO[name].blocks, any_parent=True)
    for stage in stages:
        if reason := LOOPS[column] == "norm" and NO_NORMS.get(name):
            with pytest.raises(ConfigurationError, match=reason):
                loop(model, stage.names, 2, LOOPS[column])
            record_property("remark", f"refused: {reason}")
            return
        assert loop(model, stage.names, 2, LOOPS[column]) == 1
    written_out(expected, ZOO[name].blocks, 2, shares_norms=LOOPS[column] != "norm")
    (output, gradients, _), (wanted, sums, _) = step(model, name), step(expected, name)
    assert_equal(output, wanted)
    if column == "loop":
        assert_equal([*gradients.values()], [*sums.values()])
    assert_equal(evaluated(model, name), evaluated(expected, name))
    assert unloop(model) == len(stages)
    assert_equal(dict(model.named_parameters()), dict(plain(name).named_parameters()))


@cells(NO_BLOCKS, *LOOPS)
def test_loops_without_blocks(name, column, record_property):
    model = plain(name)
    loop(model, ZOO[name].blocks, 2, LOOPS[column])
    with pytest.raises(ConfigurationError, match=r"a loop needs blocks (that keep the shape|whose first tensor)"):
        output_of(model, inputs(name))
    record_property("remark", f"refused: {NO_BLOCKS[name]}")


@cells([name for name in (*TIMM, *TRANSFORMERS) if name not in NO_CHECKPOINTING], "loop, checkpointing")
def test_gradient_checkpointing_of_loops(name, column):
    model, expected = plain(name), plain(name)
    for stage in find_stages(model, ZOO[name].blocks, any_parent=True):
        loop(model, stage.names, 2)
    written_out(expected, ZOO[name].blocks, 2)
    enable_checkpointing(model, name)
    enable_checkpointing(expected, name)
    (output, gradients, _), (wanted, sums, _) = step(model, name), step(expected, name)
    assert_equal(output, wanted)
    torch.testing.assert_close([*gradients.values()], [*sums.values()])


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in DOZEN)) for n in GENERATING])
@pytest.mark.parametrize("scale", ["test", "train"])
def test_generation_after_training(name, scale):
    model, expected = merged(name, 0.5, scale=scale), plain(name)
    step(model, name)
    prompt = {key: value for key, value in inputs(name).items() if key != "decoder_input_ids"}
    if scale == "train":
        assert_equal(model.eval().generate(**prompt, **GREEDY), expected.eval().generate(**prompt, **GREEDY))
    else:
        assert_equal(model.eval().generate(**prompt, **GREEDY), model.generate(**prompt, **GREEDY, use_cache=False))


@pytest.mark.parametrize("padded", [False, True])
def test_the_fisher_information_of_a_causal_language_model(padded):
    """Labels that are the inputs are shifted, as the model's own loss shifts them."""
    model, tokens = plain("GPT2").eval(), inputs("GPT2")["input_ids"]
    mask = torch.ones_like(tokens)
    mask[:, -2:] = not padded
    expected = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    for row, kept in zip(tokens, mask, strict=True):
        model.zero_grad()
        labels = row.where(kept > 0, -100)[None]
        (model(input_ids=row[None], attention_mask=kept[None], labels=labels).loss * (kept.sum() - 1)).backward()
        for name, weight in model.named_parameters():
            expected[name] += weight.grad.square() / len(tokens)
    labels = tokens.where(mask > 0, -100)
    found = fisher_diagonal(model, [{"input_ids": tokens, "attention_mask": mask, "labels": labels}], labels="given")
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-6)
    assert all(value.any() for value in found.values())


@pytest.fixture(scope="module")
def parallel_weights(request, tmp_path_factory):
    """The weights of both ranks after each run of zoo_run.py."""
    names = sorted({item.callspec.params["name"] for item in request.session.items if "two processes" in item.name})
    out = tmp_path_factory.mktemp("weights")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, zoo_run.__file__, str(out), *names],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    return {path.stem: torch.load(path) for path in out.glob("*.pt")}, done.stderr[-3000:]


@cells(DOZEN, "two processes")
def test_two_processes(parallel_weights, name, column):
    weights, errors = parallel_weights
    for run in zoo_run.cases(name):
        first, second = (weights.get(f"{name}-{run}-{rank}") for rank in (0, 1))
        assert first is not None, errors
        assert_equal(first, second)
        assert all(weight.isfinite().all() for weight in first.values())
