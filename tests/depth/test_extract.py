"""Shallower models against the whole ones, whose other blocks a hook skips."""

import tempfile

import pytest
import torch
import zoo
from torch import nn
from zoo import build, output_of

from tying import ConfigurationError
from tying.depth import Recurrent, Residual, StochasticDepth, Swapout, apply_merge, extract, recur, unrecur
from tying.depth.stages import find_stages
from tying.hard import LowRankResidual, audit, bake, lower_rank, relax, share_templates, tie
from tying.hashing import cluster_weight, hash_weights

# whose blocks stand in a module that is no container
NO_CONTAINER = ("densenet121", "regnetx_002")
MAIN = ("resnet18", "vit_b_16", "swin_t", "convnext_tiny", "test_vit2", "test_convnext", *zoo.TRANSFORMERS)
ALL = [
    name if name in MAIN else pytest.param(name, marks=pytest.mark.slow)
    for name in zoo.ZOO
    if name not in (*NO_CONTAINER, "vgg11_bn", "Mamba")
]
GENERATING = ("GPT2", "Llama", "Gemma2", "Mixtral", "T5", "BART", "Whisper")


def blocks_of(model, patterns):
    return {
        name: block
        for stage in find_stages(model, patterns)
        for name, block in zip(stage.names, stage.blocks, strict=True)
    }


def skip(block, arguments, keywords, output):
    """Return the input of a block in the place of its output, as a forward hook."""
    x = arguments[0] if arguments else next(iter(keywords.values()))
    return (x, *output[1:]) if isinstance(output, tuple) else x


@torch.no_grad()
def skipping(model, blocks, inputs):
    """Return the output of a model that skips these blocks."""
    hooks = [block.register_forward_hook(skip, with_kwargs=True) for block in blocks]
    try:
        return output_of(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("keep", ["every other", 0.5])
def test_extraction_skips_the_other_blocks(name, keep):
    model, arguments, patterns = build(name).eval(), zoo.ZOO[name].inputs(), zoo.ZOO[name].blocks
    blocks = [*blocks_of(model, patterns).values()]
    count = len(blocks)
    every = {*range(0, count, 2)}
    half = {round(i * (count - 1) / max(1, round(count / 2) - 1)) for i in range(round(count / 2))}
    others = [block for i, block in enumerate(blocks) if i not in (every if keep == "every other" else half)]
    before = model.state_dict()
    shallow = extract(model, patterns, keep)
    assert torch.equal(skipping(shallow, [], arguments), skipping(model, others, arguments))
    assert len(blocks_of(model, patterns)) == count
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert len(shallow.state_dict()) < len(before)


@pytest.mark.parametrize("name", [*zoo.DOZEN, "BART"])
def test_extraction_drops_as_a_merge_on_whole_blocks_does(name):
    model, arguments, patterns = build(name).eval(), zoo.ZOO[name].inputs(), zoo.ZOO[name].blocks
    shallow = extract(model, patterns)
    count = len(blocks_of(model, patterns))
    assert apply_merge(model, patterns, StochasticDepth(0.5), [1.0 - i % 2 for i in range(count)], whole=True) == count
    assert torch.equal(skipping(model, [], arguments), skipping(shallow, [], arguments))
    assert torch.equal(skipping(extract(model, patterns), [], arguments), skipping(shallow, [], arguments))


@pytest.mark.parametrize("name", [name for name in zoo.TRANSFORMERS if name != "Mamba"])
def test_a_model_built_from_the_changed_config_loads_the_extracted_weights(name):
    model, arguments = build(name).eval(), zoo.ZOO[name].inputs()
    shallow = extract(model, zoo.ZOO[name].blocks)
    with tempfile.TemporaryDirectory() as folder:
        shallow.config.save_pretrained(folder)
        config = type(shallow.config).from_pretrained(folder)
    loaded = type(model)(config).eval()
    loaded.load_state_dict(shallow.state_dict())
    assert torch.equal(output_of(loaded, arguments), output_of(shallow, arguments))
    assert model.config.num_hidden_layers == 3
    assert config.num_hidden_layers == 2


@pytest.mark.filterwarnings("ignore:.*max_length")
@pytest.mark.parametrize("name", GENERATING)
def test_extracted_models_generate(name):
    arguments = {key: value for key, value in zoo.ZOO[name].inputs(2).items() if key != "decoder_input_ids"}
    shallow = extract(build(name).eval(), zoo.ZOO[name].blocks)
    outputs = [
        shallow.generate(**arguments, max_new_tokens=5, do_sample=False, use_cache=cached) for cached in (True, False)
    ]
    assert torch.equal(*outputs)


def test_layers_are_renumbered_and_configs_follow():
    llama = extract(build("Llama"), "model.layers.*", [0, 2])
    assert [layer.self_attn.layer_idx for layer in llama.model.layers] == [0, 1]
    assert [*dict(llama.model.layers.named_children())] == ["0", "1"]
    gemma = extract(build("Gemma2"), "model.layers.*", [1, 2])
    assert gemma.config.layer_types == ["full_attention", "sliding_attention"]
    whisper = extract(build("Whisper"), "model.decoder.layers.*", [0])
    assert (whisper.config.encoder_layers, whisper.config.decoder_layers) == (3, 1)
    t5 = extract(build("T5"), "decoder.block.*", [0, 2])
    configs = (t5.config, t5.encoder.config, t5.decoder.config)
    assert [(c.num_layers, c.num_decoder_layers) for c in configs] == [(3, 2), (3, 3), (2, 2)]
    vit = extract(build("vit_b_16"), "encoder.layers.*", [0, 2])
    assert [*dict(vit.encoder.layers.named_children())] == ["encoder_layer_0", "encoder_layer_1"]
    named = nn.Sequential()
    for name in ("stem", "wide", "head"):
        named.add_module(name, nn.Linear(2, 2))
    assert [*dict(extract(named, "*").named_children())] == ["stem", "head"]


class Computing:
    """A config that computes the kind of each layer from other values, as Jamba's and ProphetNet's do."""

    def __init__(self, count):
        self.n_layers, self.depth = count, count

    @property
    def layer_types(self):
        return ["linear" if layer % 2 else "full" for layer in range(self.n_layers)]

    @property
    def num_hidden_layers(self):
        return self.n_layers

    @num_hidden_layers.setter
    def num_hidden_layers(self, count):
        raise NotImplementedError("set n_layers")


@pytest.mark.parametrize(("keep", "message"), [([0], ""), ([0, 3], ""), ([0, 2], "layer_types"), ([1], "layer_types")])
def test_configs_that_compute_their_lists(keep, message):
    model = nn.Module()
    model.layers, model.config = chain(4), Computing(4)
    if message:
        with pytest.raises(ConfigurationError, match=f"the config above 'layers' computes {message} from other values"):
            extract(model, "layers.*", keep)
        return
    config = extract(model, "layers.*", keep).config
    assert (config.n_layers, config.depth, len(config.layer_types)) == (len(keep),) * 3


def test_torchs_encoders_count_their_layers():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 3).eval()
    shallow, x = extract(encoder, "layers.*", [0, 2]), torch.randn(2, 3, 4)
    assert shallow.num_layers == 2
    assert torch.equal(shallow(x), encoder.layers[2](encoder.layers[0](x)))


def chain(count=5):
    torch.manual_seed(0)
    return nn.Sequential(*(Residual(nn.Linear(4, 4)) for _ in range(count)))


@pytest.mark.parametrize(
    ("keep", "indices"),
    [
        ("every other", [0, 2, 4]),
        ([3, 0], [0, 3]),
        ((2,), [2]),
        (1.0, [0, 1, 2, 3, 4]),
        (0.6, [0, 2, 4]),
        (0.4, [0, 4]),
        (0.2, [0]),
    ],
)
def test_keep(keep, indices):
    model = chain()
    shallow = extract(model, "*", keep)
    assert len(shallow) == len(indices)
    for block, index in zip(shallow, indices, strict=True):
        assert torch.equal(block.branch.weight, model[index].branch.weight)


@pytest.mark.parametrize("merge", [StochasticDepth(0.5), StochasticDepth(0.5, scale="train"), Swapout(0.5, 0.5)])
def test_merges_are_removed(merge):
    model, x = chain(), torch.randn(3, 4)
    expected = extract(model, "*")(x)
    apply_merge(model, "*", merge)
    shallow = extract(model, "*")
    assert torch.equal(shallow(x), expected)
    assert apply_merge(shallow, "*", merge) == 3
    assert type(model[0].merge) is type(merge)


@pytest.mark.parametrize("removed", [0, 2, 4])
def test_ties_among_the_remaining_layers_stay(removed):
    """Of three equal weights, the source and two others; of a source, its transpose and the transpose of another."""
    model, x = chain(), torch.randn(3, 4)
    tie(model, ["[024].branch.weight"])
    tie(model, ["0.branch.bias ~ 3.branch.bias", "1.branch.weight ~ 3.branch.weight | o i -> i o"])
    indices = [i for i in range(5) if i != removed]
    shallow = extract(model, "*", indices)
    with torch.no_grad():
        assert torch.equal(shallow(x), nn.Sequential(*(model[i] for i in indices))(x))
    former = {f"{new}": f"{old}" for new, old in enumerate(indices)}
    groups = [{former[name[0]] + name[1:] for name in group} for group in audit(shallow).groups]
    whole = [{name for name in group if name[0] != f"{removed}"} for group in audit(model).groups]
    assert sorted(map(sorted, groups)) == sorted(sorted(group) for group in whole if len(group) > 1)
    assert audit(shallow).problems == ()
    with pytest.raises(ConfigurationError, match="are tied, but differ"):
        shallow.load_state_dict(chain(4).state_dict())
    copied = extract(shallow, "*", [0, 1, 2])
    assert len(copied) == 3


def test_transposed_ties_outlive_their_source():
    model, x = chain(), torch.randn(3, 4)
    tie(model, [f"0.branch.weight ~ {i}.branch.weight | o i -> i o" for i in (1, 3)])
    shallow = extract(model, "*", [1, 3])
    assert shallow[0].branch.weight is shallow[1].branch.weight
    assert torch.equal(shallow(x), model[3](model[1](x)))
    assert len(shallow.state_dict()) == 4


def test_ties_made_in_a_larger_model_stay_in_the_copy_of_a_part():
    model = nn.ModuleDict({"body": chain(), "head": nn.Linear(4, 4)})
    tie(model, ["body.*.branch.weight", "head.weight ~ body.0.branch.weight"])
    shallow = extract(model["body"], "*")
    assert len({id(block.branch.weight) for block in shallow}) == 1
    assert len({id(block.branch.weight) for block in model["body"]} | {id(model["head"].weight)}) == 1


COMPUTED = {
    "hashed by layer": lambda model: hash_weights(model, ["*.branch.weight"], 0.5),
    "hashed by network": lambda model: hash_weights(model, ["*.branch.weight"], 0.5, scope="network"),
    "templates": lambda model: share_templates(model, ["*.branch.weight"], 2),
    "low rank": lambda model: lower_rank(model, ["*.branch.weight"], 2),
    "relaxed": lambda model: relax(model, ["*.branch.weight"], LowRankResidual(2)),
    "clustered": lambda model: cluster_weight(model, "2.branch.weight", 3),
}


@pytest.mark.parametrize("case", COMPUTED)
@pytest.mark.parametrize("keep", ["every other", [1, 2]])
def test_computed_weights_stay(case, keep):
    model, x = chain(), torch.randn(3, 4)
    COMPUTED[case](model)
    shallow = extract(model, "*", keep)
    indices = keep if keep != "every other" else [0, 2, 4]
    assert torch.equal(shallow(x), nn.Sequential(*(model[i] for i in indices))(x))
    chain(len(indices)).load_state_dict(bake(shallow))


def test_a_recurrent_block_is_a_block():
    model, x = nn.Sequential(*(Recurrent(Residual(nn.Linear(4, 4)), 2) for _ in range(3))), torch.randn(3, 4)
    assert torch.equal(extract(model, "*")(x), model[2](model[0](x)))


@pytest.mark.parametrize(("index", "count"), [(0, 2), (1, 1)])
def test_a_recurrent_block_counts_as_its_steps(index, count):
    model = build("Llama").eval()
    recur(model, "model.layers.[01]")
    shallow = extract(model, "model.layers.*", [index])
    layers = [layer for layer in shallow.modules() if type(layer) is type(model.model.layers[1])]
    assert [layer.self_attn.layer_idx for layer in layers] == [*range(count)]
    assert shallow.config.num_hidden_layers == count
    arguments = {**zoo.ZOO["Llama"].inputs(2), "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(shallow.generate(**arguments), shallow.generate(**arguments, use_cache=False))
    assert unrecur(shallow) == (index == 0)


def test_wrapped_models_and_blocks_have_their_plain_names():
    model, arguments = build("test_vit2").eval(), zoo.ZOO["test_vit2"].inputs(2)
    shallow = extract(torch.compile(model, backend="eager"), "blocks.*")
    assert torch.equal(skipping(shallow, [], arguments), skipping(extract(model, "blocks.*"), [], arguments))
    llama = extract(nn.ModuleDict({"backbone": build("Llama")}), "backbone.model.layers.*", [0])
    assert llama["backbone"].config.num_hidden_layers == 1


MISTAKES = {
    "nothing matches": ("layer.*", "every other", r"^blocks: pattern 'layer\.\*' matches no module"),
    "no pattern": ([], "every other", "must be a pattern of module names, or several, not"),
    "no container": (
        "*.branch",
        "every other",
        r"'0\.branch', .*: not an entry of an nn\.ModuleList or nn\.Sequential",
    ),
    "all excluded": (["[01]", "!*"], "every other", r"^blocks: '\[01\]', '!\*' exclude all that they match$"),
    "nested": (["*", "0.branch"], "every other", r"'0\.branch' is a part of '0', which matches too: name only"),
    "word": ("*", "half", "^keep must be 'every other', indices of blocks or a fraction, not 'half'$"),
    "no indices": ("*", [0.5], r"^keep must be 'every other', indices of blocks or a fraction, not \[0\.5\]$"),
    "none": ("*", [], r"^keep=\[\] would leave none of 0, 1, 2, 3, 4: keep one block or more$"),
    "small": ("*", 0.05, r"^keep=0\.05 would leave none of 0, 1, 2, 3, 4"),
    "large": ("*", 1.5, r"^keep, if it is a fraction of the blocks, must be in \(0, 1\], not 1\.5$"),
    "outside": ("*", [0, 5, -1], "^keep has the indices 5, -1, and the 5 blocks 0, 1, 2, 3, 4 have 0 to 4: choose"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case):
    blocks, keep, message = MISTAKES[case]
    with pytest.raises(ConfigurationError, match=message):
        extract(chain(), blocks, keep)


REFUSED = {
    "T5": ("encoder.block.*", r"'encoder\.block\.0' cannot be removed, since only it has the weight .*bias\.weight'"),
    "resnet18": ("layer2.*", r"'layer2\.0' cannot be removed, since it changes the shape: its downsample has weights"),
    "mobilenet_v2": ("features.*", r"'features\.\d+' cannot be removed, since .*its use_res_connect is False\. Keep"),
    "test_efficientnet": ("blocks.2.*", r"'blocks\.2\.0' cannot be removed, since .*its has_skip is False"),
    "regnet_y_400mf": ("trunk_output.block2.*", "'trunk_output.block2.block2-0' cannot be removed, since only it has"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_blocks_that_others_need_are_refused(name):
    blocks, message = REFUSED[name]
    model = build(name)
    with pytest.raises(ConfigurationError, match=message):
        extract(model, blocks, [len(blocks_of(model, blocks)) - 1])


def test_an_empty_stage_passes_on_its_input_in_a_sequence_alone():
    model, x = nn.Sequential(chain(2), chain(2)), torch.randn(3, 4)
    assert torch.equal(extract(model, "*.*", [0])(x), model[0][0](x))
    with pytest.raises(
        ConfigurationError, match=r"'model\.decoder\.layers' would be left without a block: keep one of"
    ):
        extract(build("BART"), "model.*coder.layers.*", [0])


def test_steps_are_no_blocks():
    model = nn.Sequential(Recurrent(nn.Linear(4, 4), 3))
    with pytest.raises(
        ConfigurationError, match=r"'0\.blocks\.0' is a step of a tying\.depth\.Recurrent: set its steps"
    ):
        extract(model, "0.blocks.*")


def test_projecting_shortcuts_are_refused():
    model = nn.Sequential(Residual(nn.Linear(4, 4)), Residual(nn.Linear(4, 6), nn.Linear(4, 6)))
    with pytest.raises(ConfigurationError, match=r"^'1' cannot be removed, since .*: its shortcut has weights"):
        extract(model, "*", [0])


def test_a_first_block_before_other_layers_is_removed():
    model, x = nn.Sequential(*chain(1), nn.LayerNorm(4), nn.Linear(4, 2)), torch.randn(3, 4)
    assert torch.equal(extract(model, "[01]", [1])(x), model[2](model[1](x)))


def test_a_block_that_stands_at_several_positions():
    model, x = nn.Sequential(*[chain(1)[0]] * 3, *chain(2)), torch.randn(3, 4)
    assert torch.equal(extract(model, "*")(x), model[4](model[2](model[0](x))))
    assert torch.equal(extract(model, ["[01]", "[34]"], [0, 3])(x), model[4](model[2](model[0](x))))
