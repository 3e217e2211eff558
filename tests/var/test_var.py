"""What VAR promises beyond the numbers of the original."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from var_cases import sample

from neon import NeonError
from neon.sampling import Streams, to_uint8
from nets.autoencoder import Decoder, Encoder, PixelAttention
from VAR.configs import CONFIGS
from VAR.loss import code_loss, vqvae_loss
from VAR.sampler import filter_logits, race, sample_codes
from VAR.transformer import Transformer
from VAR.vqvae import VQVAE

DIGITS = CONFIGS["digits"]


@pytest.fixture(scope="module", params=[False, True], ids=["own AdaLN", "shared AdaLN"])
def model(request):
    """A model whose gates are open, so that every part matters."""
    torch.manual_seed(0)
    transformer = Transformer(dataclasses.replace(DIGITS, shared_adaln=request.param))
    for p in transformer.parameters():
        p.data += 0.3 * torch.randn(p.shape) / math.sqrt(p.shape[-1])
    return transformer.eval()


@pytest.fixture(scope="module")
def vqvae():
    torch.manual_seed(1)
    model = VQVAE(DIGITS)
    torch.nn.init.normal_(model.quantize.embedding.weight)
    return model


OPTIONS = [
    {"cfg": 0.0},
    {"cfg": 2.0, "top_k": 40, "top_p": 0.9},
    {"cfg": 1.0, "temperature": 0.5},
    {"more_smooth": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_image_does_not_depend_on_its_batch(model, vqvae, options):
    seeds, labels = torch.tensor([7, 3, 2**33 + 1, 3]), torch.tensor([1, 4, -1, 4])
    together = sample(model, vqvae, labels, Streams(seeds), **options)
    assert together.shape == (4, 1, 8, 8) and together.min() >= 0 and together.max() <= 1
    order = torch.tensor([2, 0, 1])
    permuted = sample(model, vqvae, labels[order], Streams(seeds[order]), **options)
    torch.testing.assert_close(permuted, together[order], rtol=0, atol=1e-4)
    torch.testing.assert_close(together[1], together[3], rtol=0, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 1e-2
    alone = sample(model, vqvae, labels[2:3], Streams(seeds[2:3]), **options)
    torch.testing.assert_close(alone[0], together[2], rtol=0, atol=1e-4)


def test_labels_can_be_drawn(model, vqvae):
    ids, _ = sample_codes(model, vqvae.quantize, None, Streams([1, 2, 3]))
    streams = Streams([1, 2, 3])
    labels = streams.randint(DIGITS.classes)
    given_labels, _ = sample_codes(model, vqvae.quantize, labels, streams)
    assert torch.equal(ids, given_labels)


@pytest.mark.parametrize("cfg", [0.0, 3.0])
def test_cached_sampling_is_full_recomputation(model, vqvae, cfg):
    """Every scale's distribution is what one pass over all the drawn codes gives."""
    probs = []

    def recording(p, streams):
        probs.append(p)
        return race(p, streams)

    labels = torch.tensor([5, 0, 9])
    ids, f_hat = sample_codes(model, vqvae.quantize, labels, Streams([0, 1, 2]), cfg=cfg, draw=recording)
    *_, total = vqvae.quantize.partial_sums(ids)
    torch.testing.assert_close(f_hat, total)
    inputs = vqvae.quantize.teacher_input(ids)
    with torch.no_grad():
        conditional = model(labels, inputs)
        unconditional = model(torch.full_like(labels, DIGITS.classes), inputs)
    ramp = torch.repeat_interleave(torch.linspace(0, cfg, 3), torch.tensor([side**2 for side in DIGITS.sides]))
    guided = conditional + ramp[:, None] * (conditional - unconditional)
    torch.testing.assert_close(torch.cat(probs, dim=1), guided.softmax(-1), rtol=1e-3, atol=1e-5)


def test_a_scale_sees_itself_and_the_coarser_ones(model):
    inputs = torch.randn(1, DIGITS.tokens - 1, DIGITS.code_channels)
    first_fine = 1 + 4
    changed = inputs.clone()
    changed[:, first_fine - 1 :] += 1
    label = torch.tensor([3])
    with torch.no_grad():
        difference = (model(label, inputs) - model(label, changed)).abs().amax(-1)[0]
    assert difference[:first_fine].max() == 0 and difference[first_fine:].min() > 0


def test_temperature_sharpens(model, vqvae):
    def entropy(temperature):
        values = []

        def first(p, _):
            values.append(-(p * p.clamp_min(1e-30).log()).sum(-1).mean())
            return torch.zeros(p.shape[:2], dtype=torch.int64)  # the same history at every temperature

        sample_codes(model, vqvae.quantize, torch.tensor([1]), Streams([0]), temperature=temperature, draw=first)
        return torch.stack(values)

    assert (entropy(0.5) < entropy(1.0)).all() and (entropy(1.0) < entropy(2.0)).all()


logits = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=40).map(torch.tensor)


@settings(deadline=None, max_examples=150)
@given(logits, st.data())
def test_top_k_keeps_the_k_largest_and_their_ties(row, data):
    k = data.draw(st.integers(1, len(row)))
    kept = filter_logits(row, top_k=k).isfinite()
    assert torch.equal(kept, row >= row.sort(descending=True).values[k - 1])


@settings(deadline=None, max_examples=150)
@given(logits, st.floats(0.01, 1))
def test_top_p_keeps_the_smallest_head_that_holds_p(row, p):
    probs = row.double().softmax(-1)
    kept = filter_logits(row, top_p=p).isfinite()
    assert row[kept].max() == row.max()
    assert kept.all() or row[kept].min() >= row[~kept].max()
    assert probs[kept].sum() >= p - 1e-5
    assert kept.sum() == 1 or probs[kept].sum() - probs[kept].min() < p + 1e-5


@settings(deadline=None, max_examples=50)
@given(logits, st.integers(1, 40), st.floats(0, 1))
def test_both_filters_are_top_p_of_top_k(row, k, p):
    k = min(k, len(row))
    both = filter_logits(row, k, p)
    assert torch.equal(both, filter_logits(filter_logits(row, top_k=k), top_p=p))
    assert torch.equal(both[both.isfinite()], row[both.isfinite()])


@pytest.mark.parametrize("options", [{"top_k": 129}, {"top_k": -1}, {"top_p": 1.5}, {"temperature": 0.0}], ids=str)
def test_impossible_options(model, vqvae, options):
    with pytest.raises(NeonError):
        sample_codes(model, vqvae.quantize, torch.tensor([1]), Streams([0]), **options)


def test_impossible_labels(model, vqvae):
    with pytest.raises(NeonError):
        sample_codes(model, vqvae.quantize, torch.tensor([0, 10]), Streams([0, 1]))


def test_race_draws_from_the_distribution():
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    ids = race(probs.expand(20, 1000, 5), Streams(range(20)))
    frequency = ids.flatten().bincount(minlength=5) / ids.numel()
    assert frequency[4] == 0
    torch.testing.assert_close(frequency, probs, rtol=0, atol=5 * math.sqrt(0.25 / ids.numel()))


def test_nearly_equal_distributions_draw_nearly_the_same():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(4, 500, 64, generator=generator)
    near = logits + 0.02 * torch.randn(logits.shape, generator=generator)
    ids, others = (race(x.softmax(-1), Streams(range(4))) for x in (logits, near))
    distance = (logits.softmax(-1) - near.softmax(-1)).abs().sum(-1).mean() / 2
    assert 0 < (ids != others).float().mean() < 3 * distance < 0.05


def test_noise_comes_from_each_stream_in_turn():
    streams = Streams([4, 9])
    first, second = streams.exponential((3, 5)), streams.exponential((3, 5))
    assert not torch.equal(first, second)
    assert torch.equal(Streams([9]).exponential((3, 5))[0], first[1])


def test_uint8_truncates():
    images = torch.tensor([-1.0, 0.0, 0.999 / 255, 254.999 / 255, 1.0, 2.0])
    assert to_uint8(2 * images - 1).tolist() == [0, 0, 0, 254, 255, 255]


def test_labels_and_branches_are_dropped_as_drawn():
    config = dataclasses.replace(DIGITS, label_drop=0.5, drop_path=0.5)
    transformer = Transformer(config)
    for block in transformer.blocks:
        torch.nn.init.normal_(block.ada_lin[1].bias)  # open the gates
    torch.nn.init.normal_(transformer.head.weight)
    labels, inputs = torch.arange(8) % 10, torch.randn(8, config.tokens - 1, config.code_channels)

    def seeded(seed):
        return transformer(labels, inputs, transformer.draw(8, torch.Generator().manual_seed(seed)))

    state = torch.get_rng_state()
    assert torch.equal(seeded(1), seeded(1)) and not torch.equal(seeded(1), seeded(2))
    assert torch.equal(torch.get_rng_state(), state)  # nothing came from the global generator
    assert torch.equal(transformer(labels, inputs), transformer.eval()(labels, inputs))  # nothing without draws


def test_label_drop_is_the_no_class_row():
    transformer = Transformer(dataclasses.replace(DIGITS, label_drop=1.0, drop_path=0.0))
    inputs = torch.randn(2, DIGITS.tokens - 1, DIGITS.code_channels)
    dropped = transformer(torch.tensor([1, 2]), inputs, transformer.draw(2, torch.Generator()))
    assert torch.equal(dropped, transformer.eval()(torch.tensor([10, 10]), inputs))


def test_drop_path_keeps_the_expectation():
    transformer = Transformer(dataclasses.replace(DIGITS, depth=3, drop_path=0.4))
    factors = transformer.branch_factors(transformer.draw(20000, torch.Generator().manual_seed(0)).branches)
    assert factors.shape == (3, 2, 20000, 1, 1)
    assert (factors[0] == 1).all()
    torch.testing.assert_close(factors.mean(2).flatten(), torch.ones(6), rtol=0, atol=0.04)
    dropped = (factors == 0).float().mean(2).flatten()
    torch.testing.assert_close(dropped, torch.tensor([0, 0, 0.2, 0.2, 0.4, 0.4]), rtol=0, atol=0.02)


def test_weights_start_as_told():
    config = dataclasses.replace(DIGITS, width=96, heads=4, depth=2)
    for shared in (False, True):
        transformer = Transformer(dataclasses.replace(config, shared_adaln=shared))
        transformer.init_weights(torch.Generator().manual_seed(3))
        again = Transformer(dataclasses.replace(config, shared_adaln=shared))
        again.init_weights(torch.Generator().manual_seed(3))
        for p, q in zip(transformer.parameters(), again.parameters()):
            assert torch.equal(p, q)
        std, block = math.sqrt(1 / (3 * 96)), transformer.blocks[0]
        expected = {
            transformer.class_emb.weight: std,
            block.attn.mat_qkv.weight: std,
            block.attn.proj.weight: std / 2,
            block.ffn.fc2.weight: std / 2,
            transformer.head.weight: 0.02 * std,
            transformer.head_nm["ada_lin"][1].weight: 0.5 * std,
        }
        for weight, value in expected.items():
            assert weight.std().item() == pytest.approx(value, rel=0.1)
        gates, rest, value = (
            (block.ada_gss[0, 0, :2], block.ada_gss[0, 0, 2:], math.sqrt(1 / 96))
            if shared
            else (*block.ada_lin[1].weight.split([192, 384]), std)
        )
        assert gates.std().item() == pytest.approx(1e-5 * value, rel=0.2)
        assert rest.std().item() == pytest.approx(0.5 * value, rel=0.2)
        assert not transformer.head.bias.any()


def test_a_merged_file_with_levels_as_floats():
    transformer = Transformer(DIGITS)
    levels = transformer.lvl_1L.clone()
    for assign in (False, True):
        transformer.load_state_dict(transformer.state_dict() | {"lvl_1L": levels.float()}, assign=assign)
        assert torch.equal(transformer.lvl_1L, levels) and transformer.lvl_1L.dtype == torch.int64


def test_built_on_meta_and_filled_from_a_checkpoint(model):
    with torch.device("meta"):
        empty = Transformer(model.config)
    empty.load_state_dict(model.state_dict(), assign=True)
    inputs = torch.randn(2, DIGITS.tokens - 1, DIGITS.code_channels)
    labels = torch.tensor([0, 10])
    assert torch.equal(empty.eval()(labels, inputs), model(labels, inputs))


def test_half_precision(model, vqvae):
    """Under autocast codes stay what they are, logits and f̂ stay float32; training alone halves the residual stream."""
    images, labels = torch.rand(3, 1, 8, 8) * 2 - 1, torch.tensor([1, 2, 3])
    ids, streams, residual = vqvae.encode(images), Streams([0, 1, 2]), []
    expected = code_loss(model, vqvae.quantize, ids, labels)
    handle = model.blocks[-1].register_forward_hook(lambda _, __, out: residual.append(out[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vqvae.encode(images), ids)
        inputs = vqvae.quantize.teacher_input(ids)
        assert inputs.dtype == torch.float32
        assert model(labels, inputs).dtype == torch.float32
        assert residual == [torch.bfloat16]
        torch.testing.assert_close(code_loss(model, vqvae.quantize, ids, labels), expected, rtol=0.02, atol=0.02)
        residual.clear()
        _, f_hat = sample_codes(model, vqvae.quantize, labels, streams, cfg=1.0)
        assert f_hat.dtype == torch.float32
        assert residual == [torch.float32] * len(DIGITS.sides)
        assert sample(model, vqvae, labels, streams).dtype == torch.float32
    handle.remove()


def test_vqvae_learns():
    """A few steps on one batch lower the loss, through the quantizer: encoder, codes, φ and decoder all move."""
    torch.manual_seed(0)
    model = VQVAE(DIGITS)
    images = torch.rand(16, 1, 1, 1).expand(-1, -1, 8, 8) * torch.linspace(-1, 1, 8)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        losses.append(vqvae_loss(model, images))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    for part in (
        "encoder.conv_in",
        "quant_conv",
        "quantize.embedding",
        "quantize.quant_resi.qresi_ls.0",
        "decoder.conv_out",
    ):
        assert not torch.equal(before[f"{part}.weight"], model.get_parameter(f"{part}.weight"))


def test_the_decoder_gradient_passes_the_quantizer():
    model = VQVAE(DIGITS)
    reconstruction, _ = model(torch.rand(2, 1, 8, 8) * 2 - 1)
    reconstruction.square().sum().backward()
    assert model.encoder.conv_in.weight.grad.abs().max() > 0
    assert model.quantize.embedding.weight.grad is None or not model.quantize.embedding.weight.grad.any()


@pytest.mark.parametrize("attend", [False, True])
def test_autoencoder_shapes(attend):
    encoder = Encoder(1, 6, 8, (1, 2, 2), groups=4, fused=False)
    decoder = Decoder(6, 1, 8, (1, 2, 2), groups=4, fused=False, attend=attend)
    z = encoder(torch.randn(2, 1, 16, 8))
    assert z.shape == (2, 6, 4, 2)
    assert decoder(z).shape == (2, 1, 16, 8)
    assert any(name.startswith("up.2.attn") for name in decoder.state_dict()) == attend


def test_fused_and_separate_attention_agree():
    fused, separate = PixelAttention(8, 4, fused=True), PixelAttention(8, 4, fused=False)
    state = fused.state_dict()
    for kind in ("weight", "bias"):
        for name, part in zip("qkv", state.pop(f"qkv.{kind}").chunk(3)):
            state[f"{name}.{kind}"] = part
    separate.load_state_dict(state)
    x = torch.randn(2, 8, 3, 5)
    torch.testing.assert_close(separate(x), fused(x))
