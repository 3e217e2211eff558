import pytest
import torch
from imm_tiny import golden, near, tiny

from imm.network import nt_to_time
from imm.sampler import pushforward, sample, schedule, start_noise
from neon import NeonError
from neon.sampling import Streams

NET = tiny()


@pytest.mark.parametrize("eps", [0.0, 0.006])
@pytest.mark.parametrize("kind", ["uniform", "edm"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_schedules(eps, kind, steps):
    g, net = golden("schedules"), tiny(eps=eps)
    near(schedule(net, steps, kind), g[f"{kind}{steps}_eps{eps}_f64"], rtol=1e-12, atol=0)
    near(schedule(net, steps, kind, torch.float32), g[f"{kind}{steps}_eps{eps}_f32"], rtol=1e-5, atol=1e-7)


def mid_times():
    """Two jumps by way of noise-to-signal ratio 1.4, which the original rounds to float32."""
    middle = nt_to_time(torch.tensor(1.4)).item()
    return torch.tensor([0.994, middle, 0.0], dtype=torch.float64)


def test_pushforward():
    g = golden("sampler_pushforward")
    near(mid_times(), golden("schedules")["midnt1.4_eps0.0_f64"], rtol=1e-12, atol=0)
    runs = {f"uniform{n}_cfg1.5_f{b}": ("uniform", n, 1.5, b) for n in (1, 2, 4, 8) for b in (64, 32)}
    runs |= {"uniform8_cfg1.8_f32": ("uniform", 8, 1.8, 32), "edm4_cfg1.8_f64": ("edm", 4, 1.8, 64)}
    for name, (kind, steps, cfg, bits) in runs.items():
        times = schedule(NET, steps, kind, getattr(torch, f"float{bits}"))
        near(pushforward(NET, g["latents"], g["class_labels"], times, cfg), g[name], rtol=0, atol=1e-4)
    near(pushforward(NET, g["latents"], g["class_labels"], mid_times()), g["midnt_1.4_cfgNone_f64"], rtol=0, atol=1e-4)


def test_start_noise_is_the_originals_generator_one_stream_per_image():
    """A stream seeded 42 + rank begins as the original's batch did: the same generator, the same scale."""
    g, real = golden("init_noise"), tiny(img_resolution=32)
    streams = Streams([42, 43])
    first = start_noise(real, streams)
    streams.randn((4, 32, 32))  # the second image of the original's batch of two
    then = start_noise(real, streams)
    assert first.shape == (2, 4, 32, 32) and first.dtype == torch.float32
    for rank in (0, 1):
        assert torch.equal(first[rank].flatten()[:8], g[f"rank{rank}_first8"])
        assert torch.equal(then[rank].flatten()[:8], g[f"rank{rank}_batch2_next8"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_image_does_not_depend_on_its_batch(dtype):
    seeds, labels = [5, 0, 9, 2, 7], torch.tensor([3, 1, 4, 1, 5])
    options = {"steps": 4, "cfg": 1.5, "dtype": dtype}
    whole = sample(NET, Streams(seeds), labels, **options)
    assert whole.dtype == dtype and whole.shape == (5, 4, 8, 8)
    parts = [sample(NET, Streams(seeds[i:j]), labels[i:j], **options) for i, j in [(0, 1), (1, 3), (3, 5)]]
    near(whole, torch.cat(parts), rtol=0, atol=1e-5)
    backwards = sample(NET, Streams(seeds[::-1]), labels.flip(0), **options)
    near(whole, backwards.flip(0), rtol=0, atol=1e-5)
    assert (whole[0] - whole[1]).abs().max() > 0.1


def test_sampling_repeats_bit_for_bit_and_leaves_global_randomness_alone():
    labels, state = torch.tensor([3, 1]), torch.get_rng_state()
    a, b = (sample(NET, Streams([1, 2]), labels) for _ in range(2))
    assert torch.equal(a, b) and not a.requires_grad
    assert torch.equal(torch.get_rng_state(), state)


def test_sample_is_pushforward_from_the_streams():
    g = golden("sampler_pushforward")

    class Given(Streams):
        def randn(self, shape, dtype=torch.float32):
            return g["latents"] / NET.sigma_data

    labels = g["class_labels"].argmax(1)
    near(sample(NET, Given([0, 1, 2]), labels, steps=8, cfg=1.5), g["uniform8_cfg1.5_f64"], rtol=0, atol=1e-4)


def test_mistakes_are_named():
    with pytest.raises(NeonError, match="at least one step"):
        schedule(NET, 0)
    with pytest.raises(NeonError, match="no schedule 'cosine'"):
        schedule(NET, 4, "cosine")
    with pytest.raises(NeonError, match="guidance"):
        sample(NET, Streams([0]), None, cfg=1.5)
    assert sample(NET, Streams([0]), None, cfg=None).isfinite().all()
