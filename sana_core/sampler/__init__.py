"""From noise to latents: schedules give the sigmas, samplers walk along them, guidance makes the denoiser they call."""
