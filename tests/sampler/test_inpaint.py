import torch

from sana_core.sampler.inpaint import inpaint_denoiser, latent_mask


def test_the_model_sees_the_image_at_the_steps_noise_and_what_it_says_there_is_ignored():
    image, noise, x = (torch.randn(2, 4, 2, 3) for _ in range(3))
    mask = torch.tensor([[0.0, 1.0, 0.25], [1.0, 0.0, 0.0]]).expand(2, 1, 2, 3)
    sigma = torch.tensor([0.75, 0.75])
    seen = []

    def model(x, sigma, **extra):
        seen.append((x, sigma, extra))
        return torch.full_like(x, 7.0)

    denoised = inpaint_denoiser(model, image, noise, mask)(x, sigma, note=1)
    ((shown, level, extra),) = seen
    assert level is sigma and extra == {"note": 1}
    torch.testing.assert_close(shown, mask * x + (1 - mask) * (0.25 * image + 0.75 * noise))
    torch.testing.assert_close(denoised, mask * 7 + (1 - mask) * image)


def test_a_position_that_the_mask_touches_is_drawn_whole():
    mask = torch.zeros(1, 1, 64, 96)
    mask[0, 0, 33, 5], mask[0, 0, 0, 95] = 1.0, 0.5
    assert latent_mask(mask, 32).tolist() == [[[[0, 0, 0.5], [1, 0, 0]]]]
