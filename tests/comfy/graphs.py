"""Pieces of workflows, and what comes out of them."""

PROMPT = "a red cat on the left of a blue background"


def encode(graph, clip, text=PROMPT):
    return graph.add("SanaPromptEncode", clip=clip, text=text, use_instruction=bool(text))


def empty(graph, width=96, height=64, batch_size=1):
    return graph.add("SanaEmptyLatent", width=width, height=height, batch_size=batch_size)


def sample(graph, models, latent=None, seed=7, steps=4, cfg=4.5, text=PROMPT, **changes):
    model, clip, _ = models
    inputs = dict(sampler="flow_dpm-solver", shift=0.0, denoise=1.0, seed=seed, steps=steps, cfg=cfg) | changes
    positive, negative = encode(graph, clip, text), encode(graph, clip, "")
    latent = latent or empty(graph)
    return graph.add("SanaSampler", model=model, positive=positive, negative=negative, latent_image=latent, **inputs)


def k_sample(graph, model, positive, negative, latent, steps=4):
    return graph.add(
        "KSampler", model=model, positive=positive, negative=negative, latent_image=latent, seed=7, steps=steps,
        cfg=4.5, sampler_name="euler", scheduler="simple", denoise=1.0,
    )  # fmt: skip


def save(graph, image):
    return graph.add("SaveImage", images=image, filename_prefix="test")


def save_latent(graph, latent):
    return graph.add("SaveLatent", samples=latent, filename_prefix="latents/test")


def finished(server, graph):
    run = server.run(graph)
    assert run.error is None, "".join([run.error["exception_message"], *run.error["traceback"]])
    return run


def latent_of(server, graph):
    (latent,) = server.latents(finished(server, graph))
    return latent


def pictures_of(server, graph):
    return server.images(finished(server, graph))
