"""Stages turned into recurrent blocks, and back, against models of equal copies."""

import copy
import pickle

import pytest
import torch
import zoo
from torch import nn
from zoo import build, loss_of, output_of

from tying import ConfigurationError
from tying.depth import Recurrent, Residual, StochasticDepth, apply_merge, extract, recur, remove_merge, unrecur
from tying.depth.recurrent import norms_in
from tying.depth.stages import find_stages
from tying.hard import audit, bake, lower_rank, tie, untie
from tying.hashing import hash_weights
from tying.weights.derived import count_parameters

# of stages of two equal blocks or more; the pattern, if it is not the zoo's
STAGES = {
    "vit_b_16": None,
    "swin_t": None,
    "convnext_tiny": None,
    "test_vit2": None,
    "efficientnet_b0": "features.3.[12]",
    "GPT2": None,
    "Llama": None,
    "Gemma2": None,
    "Mixtral": None,
    "BERT": None,
    "T5": None,
    "BART": None,
    "Whisper": None,
    "ViT": None,
    "Mamba": None,
    "regnet_y_400mf": None,
    "convnext_atto": None,
    "poolformerv2_s12": None,
    "fastvit_t8": None,
    "mobilevit_xxs": None,
    "vit_tiny_patch16_224": None,
    "eva02_tiny_patch14_224": None,
    "swin_tiny_patch4_window7_224": None,
    "mixer_s32_224": None,
    "xcit_nano_12_p16_224": None,
}
SLOW = [*STAGES][14:]
CASES = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in STAGES]
GENERATING = ("GPT2", "Llama", "Gemma2", "Mixtral", "T5", "BART", "Whisper")


def pattern_of(name):
    return STAGES[name] or zoo.ZOO[name].blocks


def of_equal_blocks(name):
    """Return a model of the zoo, the blocks of each stage copies of its first."""
    model = build(name)
    if name == "Gemma2":  # whose layers attend in two ways
        model.config.layer_types = ["full_attention"] * 3
        model = type(model)(model.config)
    for stage in find_stages(model, pattern_of(name)):
        for block in stage.blocks[1:]:
            block.load_state_dict(stage.blocks[0].state_dict())
    return model


@pytest.mark.parametrize("name", CASES)
def test_a_recurrent_block_is_a_stage_of_copies(name):
    """Values and, in training, gradients, which are the sums over the steps; back again, and the same names."""
    plain, model, arguments = of_equal_blocks(name), of_equal_blocks(name), zoo.ZOO[name].inputs()
    model.load_state_dict(plain.state_dict())
    stages = find_stages(plain, pattern_of(name))
    assert recur(model, pattern_of(name)) == len(stages)
    for mode in (False, True):
        torch.manual_seed(0)
        expected = loss_of(output_of(plain.train(mode), arguments))
        torch.manual_seed(0)
        loss = loss_of(output_of(model.train(mode), arguments))
        assert torch.equal(loss, expected)
    expected.backward()
    loss.backward()
    recurrents = [module for module in model.modules() if isinstance(module, Recurrent)]
    for stage, recurrent in zip(stages, recurrents, strict=True):
        assert recurrent.steps == len(recurrent.blocks) == len(stage.blocks)
        norms = norms_in(stage.blocks[0])
        for key, parameter in stage.blocks[0].named_parameters():
            gradients = [block.get_parameter(key).grad for block in stage.blocks]
            if key.rpartition(".")[0] in norms or parameter.grad is None:
                continue
            torch.testing.assert_close(
                recurrent.blocks[0].get_parameter(key).grad, sum(gradients), rtol=1e-3, atol=1e-6
            )
    shared = sum(
        parameter.numel() * (len(stage.blocks) - 1)
        for stage in stages
        for key, parameter in stage.blocks[0].named_parameters()
        if key.rpartition(".")[0] not in norms_in(stage.blocks[0])
    )
    assert count_parameters(model)[0] == count_parameters(plain)[0] - shared
    assert unrecur(model) == len(stages)
    assert [*model.state_dict()] == [*plain.state_dict()]
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    model.load_state_dict(plain.state_dict())
    assert torch.equal(output_of(model.eval(), arguments), output_of(plain.eval(), arguments))


@pytest.mark.filterwarnings("ignore:.*max_length")
@pytest.mark.parametrize("name", GENERATING)
@pytest.mark.parametrize("per_step_norm", [True, False])
def test_generation_gives_every_step_its_cache(name, per_step_norm):
    plain, model = of_equal_blocks(name).eval(), of_equal_blocks(name).eval()
    model.load_state_dict(plain.state_dict())
    recur(model, pattern_of(name), per_step_norm=per_step_norm)
    arguments = {key: value for key, value in zoo.ZOO[name].inputs(2).items() if key != "decoder_input_ids"}
    arguments |= {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**arguments), plain.generate(**arguments))


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Gemma2"])
def test_more_steps_have_caches_too(name):
    model = of_equal_blocks(name).eval()
    recur(model, pattern_of(name), steps=5)
    arguments = {**zoo.ZOO[name].inputs(2), "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**arguments), model.generate(**arguments, use_cache=False))
    assert model.config.num_hidden_layers == 5
    assert getattr(model.config, "layer_types", None) in (None, ["full_attention"] * 5)
    inputs = zoo.ZOO[name].inputs()
    expected = output_of(model, inputs)
    recurrent = next(module for module in model.modules() if isinstance(module, Recurrent))
    with pytest.raises(
        ConfigurationError, match="steps=6 would use the last of 5 blocks repeatedly, and with it one cache"
    ):
        recurrent.steps = 6
    unrecur(model)
    assert len(find_stages(model, pattern_of(name))[0].blocks) == 5
    assert torch.equal(output_of(model, inputs), expected)
    assert model.config.num_hidden_layers == 5


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize(
    ("name", "switch"), [("Llama", "gradient_checkpointing_enable"), ("test_vit2", "set_grad_checkpointing")]
)
def test_checkpointing_of_the_libraries(name, switch):
    models, arguments = [build(name), build(name)], zoo.ZOO[name].inputs(2)
    for model in models:
        recur(model, pattern_of(name))
    getattr(models[1], switch)()
    for model in models:
        loss_of(output_of(model, arguments)).backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(*(model.parameters() for model in models), strict=True))


def layer():
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())


def chain(count=4):
    torch.manual_seed(0)
    return nn.Sequential(*(Residual(layer()) for _ in range(count)), nn.Linear(4, 2))


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def test_step_t_is_block_t_with_the_first_blocks_weights():
    model, plain = chain(), chain()
    recur(model, "{0..3}")
    for block in plain[1:4]:
        with torch.no_grad():
            block.branch[0].weight.copy_(plain[0].branch[0].weight)
            block.branch[0].bias.copy_(plain[0].branch[0].bias)
    assert torch.equal(model(X), plain(X))
    for step, block in enumerate(model[0].blocks):
        assert torch.equal(block.branch[1].running_mean, plain[step].branch[1].running_mean)
    assert {*model.state_dict()} == {
        *(f"0.blocks.{step}.{key}" for step in range(4) for key in plain[0].state_dict()),
        "1.weight",
        "1.bias",
    }


def test_the_mean_and_common_norms():
    model, plain = chain(), chain()
    for block in plain[:4]:
        nn.init.normal_(block.branch[1].weight)
    model.load_state_dict(plain.state_dict())
    recur(model, "{0..3}", per_step_norm=False, init="mean")
    for key, parameter in model[0].blocks[0].named_parameters():
        torch.testing.assert_close(parameter, sum(block.get_parameter(key) for block in plain[:4]) / 4)
    assert len({id(block.branch[1]) for block in model[0].blocks}) == 1
    assert count_parameters(model)[0] == 4 * 4 + 4 + 4 + 4 + 10
    expected = copy.deepcopy(model)(X)
    unrecur(model)
    model.eval()
    assert [*model.state_dict()] == [*plain.state_dict()]
    assert len({id(block.branch[1]) for block in model[:4]}) == 4
    assert expected.shape == model(X).shape


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_any_number_of_steps(steps):
    model = chain().eval()
    blocks = [copy.deepcopy(block) for block in model[:4]]
    for block in blocks:
        block.branch[0].load_state_dict(blocks[0].branch[0].state_dict())
    recur(model, "{0..3}", steps)
    expected = nn.Sequential(*(blocks[step % 4] for step in range(steps)), model[1])(X)
    assert torch.equal(model(X), expected)
    assert len(model[0].blocks) == model[0].steps == steps
    unrecur(model)
    assert len(model) == steps + 1
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("steps", [2, 6])
def test_steps_changed_since_are_the_steps_of_the_blocks(steps):
    model = chain().eval()
    recur(model, "{0..3}")
    model[0].steps = steps
    expected = model(X)
    unrecur(model)
    assert len(model) == steps + 1
    assert torch.equal(model(X), expected)


def test_the_config_counts_steps_changed_since():
    model = of_equal_blocks("ViT").eval()
    recur(model, pattern_of("ViT"))
    model.vit.layers[0].steps = 5
    expected = output_of(model, zoo.ZOO["ViT"].inputs(2))
    unrecur(model)
    assert model.config.num_hidden_layers == len(model.vit.layers) == 5
    assert expected.shape == output_of(model, zoo.ZOO["ViT"].inputs(2)).shape


def test_runs_are_stages():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(7)))
    assert recur(model, ["[01]", "[456]"]) == 2
    assert [type(module).__name__ for module in model] == ["Recurrent", "Linear", "Linear", "Recurrent"]
    assert [len(model[place].blocks) for place in (0, 3)] == [2, 3]
    assert audit(model).problems == ()
    with pytest.raises(ConfigurationError, match=r"^blocks: '0' is recurrent already: change the steps"):
        recur(model, "*")
    assert recur(model, "[12]") == 1
    assert unrecur(model) == 3
    assert [*dict(model.named_children())] == [*"0123456"]


def test_named_entries_keep_their_names():
    model = nn.Sequential()
    for name in ("first", "second", "third", "head"):
        model.add_module(name, nn.Linear(4, 4))
    recur(model, ["first", "second", "third"])
    assert [*dict(model.named_children())] == ["first", "head"]
    unrecur(model)
    assert [*dict(model.named_children())] == ["first", "second", "third", "head"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torchs_encoder():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), 3).eval()
    plain, x = copy.deepcopy(encoder), torch.randn(2, 3, 4)
    mask = torch.tensor([[False, False, True], [False, False, False]])
    recur(encoder, "layers.*")
    for mode in (True, False):
        ours, theirs = (model.train(mode)(x, src_key_padding_mask=mask) for model in (encoder, plain))
        assert torch.equal(ours[~mask], theirs[~mask])
    with torch.no_grad():
        assert torch.equal(encoder(x, src_key_padding_mask=mask), plain(x, src_key_padding_mask=mask))


def test_each_weight_is_in_the_optimizer_once_and_training_is_of_one_block():
    model = chain()
    recur(model, "{0..3}")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert len(optimizer.param_groups[0]["params"]) == 2 + 4 * 2 + 2
    model(X).square().sum().backward()
    optimizer.step()
    assert len({id(block.branch[0].weight) for block in model[0].blocks}) == 1
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert len({id(block.branch[0].weight) for block in twin[0].blocks}) == 1
    other = chain()
    recur(other, "{0..3}")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), model(X))
    assert unrecur(twin) == 1
    assert len({id(block.branch[0].weight) for block in twin[:4]}) == 4


@pytest.mark.parametrize("compiled", [False, True])
def test_hidden_states_by_keyword_and_tuples(compiled):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, hidden_states, scale, bias=None):
            return hidden_states + scale * self.linear(hidden_states), bias

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x):
            bias = torch.ones(())
            for block in self.layers:
                x, bias = block(hidden_states=x, scale=2.0, bias=bias)
            return x, bias

    model, plain = Model(), Model()
    for block in plain.layers:
        block.load_state_dict(model.layers[0].state_dict())
    recur(model, "layers.*")
    run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    assert torch.equal(run(X)[0], plain(X)[0])
    assert run(X)[1] == 1
    model.layers[0].steps = 2
    model(X)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_ties_and_hashes_on_top():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)), nn.Linear(4, 4))
    recur(model, "{0..2}")
    tie(model, ["0.blocks.0.weight ~ 1.weight | o i -> i o"])
    assert torch.equal(model[1].weight, model[0].blocks[2].weight.T)
    with pytest.raises(ConfigurationError, match=r"are tied, and their names would change: untie them"):
        unrecur(model)
    assert untie(model, ["1.weight"]) > 0


@pytest.mark.parametrize("scope", ["layer", "network"])
def test_hashes_of_shared_weights(scope):
    model, plain = chain(), chain()
    recur(model, "{0..3}")
    hash_weights(model, ["0.blocks.*.branch.0.weight", "1.weight"], 0.5, scope=scope)
    assert torch.equal(model[0].blocks[0].branch[0].weight, model[0].blocks[3].branch[0].weight)
    model(X).sum().backward()
    with pytest.raises(
        ConfigurationError, match=r"^'0' computes its weights .*: make them parameters again before unrecur"
    ):
        unrecur(model)
    baked = nn.Sequential(Recurrent(plain[0], 4), plain[4])
    baked.load_state_dict(bake(model))
    assert torch.equal(baked.eval()(X), model.eval()(X))


@pytest.mark.parametrize("merge", [StochasticDepth(0.5, "row"), StochasticDepth(0.0)])
def test_merges_before_and_after(merge):
    models = [chain().eval() for _ in range(2)]
    apply_merge(models[0], "{0..3}", merge)
    recur(models[0], "{0..3}")
    recur(models[1], "{0..3}")
    apply_merge(models[1], "0", merge)
    assert torch.equal(models[0](X), models[1](X))
    assert remove_merge(models[0]) == remove_merge(models[1]) == 4
    assert torch.equal(models[0](X), models[1](X))


def test_an_extracted_model_becomes_recurrent():
    model = extract(build("Llama"), "model.layers.*")
    recur(model, "model.layers.*")
    assert model.config.num_hidden_layers == 2
    assert len(model.model.layers) == 1


def unequal(change):
    model = chain()
    change(model)
    return model


def freeze(model):
    model[1].branch[0].weight.requires_grad_(False)


MISTAKES = {
    "one": (chain, "0", "^blocks: '0' has no other block beside it in 'the model': a stage needs two blocks or more"),
    "nothing matches": (chain, "layers.*", r"^blocks: pattern 'layers\.\*' matches no module"),
    "no container": (chain, "0.branch", r"^blocks: '0\.branch': not an entry of an nn\.ModuleList or nn\.Sequential"),
    "classes": (chain, "*", "^blocks: '0' is a Residual and '4' a Linear: the blocks of a stage must be equal"),
    "shapes": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)),
        "*",
        r"^blocks: '0\.weight' and '1\.weight' have the shapes \(4, 4\) and \(3, 4\): the blocks of a stage must be equal",
    ),
    "weights": (
        lambda: nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4)),
        "*",
        r"^blocks: '1' has a weight 'bias' of shape \(4,\), which '0' lacks",
    ),
    "position bias": (
        lambda: build("T5"),
        "encoder.block.*",
        r"^blocks: 'encoder\.block\.0' has a weight '.*bias\.weight'",
    ),
    "kinds": (
        lambda: build("Gemma2"),
        "model.layers.*",
        "^blocks: self_attn.layer_type of 'model.layers.0' is 'sliding",
    ),
    "frozen": (lambda: unequal(freeze), "{0..3}", r"^blocks: '1\.branch\.0\.weight' cannot share the weight of '0'"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(4), nn.LazyLinear(4)), "*", r"^blocks: '0\.weight' has no shape yet"),
    "computed": (
        lambda: unequal(lambda model: lower_rank(model, ["*.branch.0.weight"], 2)),
        "{0..3}",
        r"^blocks: '0' computes its weights branch\.0\.weight: call recur first, then",
    ),
    "tied": (
        lambda: unequal(lambda model: tie(model, ["[12].branch.0.weight"])),
        "{0..3}",
        r"'1\.branch\.0\.weight', '2\.branch\.0\.weight' are tied, and their names would change: untie them by",
    ),
    "reversible": (
        lambda: unequal(lambda model: setattr(model[0], "backward_pass", len)),
        "{0..3}",
        "^blocks: '0' is reversible, and computes its gradients by itself, which a Recurrent cannot: tie the weights",
    ),
    "twice": (lambda: nn.Sequential(*[nn.Linear(4, 4)] * 2), "*", "'0' has no other block beside it in 'the model'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_change_nothing(case):
    make, blocks, message = MISTAKES[case]
    model = make()
    modules, parameters = [*model.modules()], [*model.parameters()]
    with pytest.raises(ConfigurationError, match=message):
        recur(model, blocks)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


@pytest.mark.parametrize("arguments", [{"steps": 0}, {"init": "first"}])
def test_arguments(arguments):
    with pytest.raises(
        ConfigurationError, match=r"steps must be an integer, 1 or more|init must be 'source' or 'mean'"
    ):
        recur(chain(), "{0..3}", **arguments)


GRAPHS = {
    "torch.fx": lambda model: torch.fx.symbolic_trace(model),
    "torch.jit.trace": lambda model: torch.jit.trace(model, X),
    "torch.export": lambda model: torch.export.export(model, (X,)).module(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.trace.*:FutureWarning")
@pytest.mark.parametrize("graph", GRAPHS)
def test_graphs_and_copies(graph):
    model = chain().eval()
    recur(model, "{0..3}", 6)
    assert torch.equal(GRAPHS[graph](model)(X), model(X))
    assert torch.equal(GRAPHS[graph](model[0])(X), model[0](X))
