"""The pack's nodes and ComfyUI's own, together on a real server."""

import pytest
import torch
from safetensors.torch import save_file

from sana_core import SanaPipeline
from sana_core.sampler.schedule import get_sigmas_flow
from tests.comfy.graphs import (
    PROMPT,
    empty,
    encode,
    finished,
    k_sample,
    latent_of,
    pictures_of,
    sample,
    save,
    save_latent,
)

pytestmark = pytest.mark.server


def is_a_picture(image, size):
    low, high = zip(*image.getextrema(), strict=True)
    return image.size == size and max(high) > min(low)


def test_every_node_is_offered(server, part):
    info = server.get("/object_info")
    for node in part("nodes").NODES:
        node_id = node.define_schema().node_id
        assert info[node_id]["python_module"] == "custom_nodes.ComfyUI-Sana"
    loader = info["SanaDiffusionModelLoader"]["input"]["required"]["model_name"]
    assert "tiny.safetensors" in str(loader)
    assert "IMPORT FAILED" not in server.text()


def test_help_and_translations_are_served(server, part):
    chinese = server.get("/i18n")["zh"]["nodeDefs"]
    for node in part("nodes").NODES:
        node_id = node.define_schema().node_id
        assert chinese[node_id]["display_name"]
        assert server.read(f"/extensions/ComfyUI-Sana/docs/{node_id}.md").startswith("# ")


def test_all_in_one(server, graph, models):
    image = graph.add("SanaDCAEDecode", samples=sample(graph, models), vae=models[2], tile_size=0, tiling="auto")
    save(graph, image)
    (picture,) = pictures_of(server, graph)
    assert is_a_picture(picture, (96, 64))


@pytest.mark.parametrize("decoder", ["VAEDecode", "VAEDecodeTiled"])
def test_stock_nodes(server, graph, models, decoder):
    model, clip, vae = models
    positive, negative = (graph.add("CLIPTextEncode", clip=clip, text=text) for text in (PROMPT, "blurry"))
    latent = graph.add("EmptyLatentImage", width=96, height=64, batch_size=1)
    samples = k_sample(graph, model, positive, negative, latent)
    tiling = dict(tile_size=64, overlap=32, temporal_size=64, temporal_overlap=8) if decoder == "VAEDecodeTiled" else {}
    save(graph, graph.add(decoder, samples=samples, vae=vae, **tiling))
    (picture,) = pictures_of(server, graph)
    assert is_a_picture(picture, (96, 64))


def advanced(graph, models, model=None, sampler=None, sigmas=None):
    model = model or models[0]
    guider = graph.add(
        "CFGGuider", model=model, positive=encode(graph, models[1]), negative=encode(graph, models[1], ""), cfg=4.5
    )
    return graph.add(
        "SamplerCustomAdvanced",
        noise=graph.add("RandomNoise", noise_seed=7),
        guider=guider,
        sampler=sampler or graph.add("SanaFlowDPMSolver"),
        sigmas=sigmas
        or graph.add("SanaScheduler", model=model, steps=4, shift=0.0, denoise=1.0, schedule="flow_dpm-solver"),
        latent_image=empty(graph),
    )


@pytest.fixture(scope="module")
def pipeline(tiny_models):
    folders = {"transformer": "diffusion_models", "vae": "vae", "text_encoder": "text_encoders"}
    return SanaPipeline.from_files(
        **{name: tiny_models / folder / "tiny.safetensors" for name, folder in folders.items()}, device="cpu"
    )


def test_a_seed_gives_one_picture(server, graph, models, pipeline):
    save_latent(graph, sample(graph, models))
    all_in_one = latent_of(server, graph)
    graph.remove("SaveLatent")
    save_latent(graph, advanced(graph, models))
    custom = latent_of(server, graph)
    expected = pipeline(PROMPT, seed=7, num_inference_steps=4, height=64, width=96, output_type="latent") / 0.41407
    scale = expected.abs().max()
    assert (all_in_one - expected).abs().max() < 1e-5 * scale
    assert (custom - expected).abs().max() < 1e-5 * scale
    other = pipeline(PROMPT, seed=8, num_inference_steps=4, height=64, width=96, output_type="latent") / 0.41407
    assert (all_in_one - other).abs().max() > 0.1 * scale


def test_flow_euler_is_the_pipelines(server, graph, models, pipeline):
    save_latent(graph, sample(graph, models, sampler="flow_euler", shift=2.0, cfg=1.0))
    expected = pipeline(
        PROMPT, seed=7, num_inference_steps=4, height=64, width=96, output_type="latent", sampler="flow_euler",
        shift=2.0, guidance_scale=1,
    )  # fmt: skip
    assert (latent_of(server, graph) * 0.41407 - expected).abs().max() < 1e-5 * expected.abs().max()


def test_batch_of_two(server, graph, models):
    latent = sample(graph, models, empty(graph, batch_size=2))
    save(graph, graph.add("VAEDecode", samples=latent, vae=models[2]))
    first, second = pictures_of(server, graph)
    assert is_a_picture(first, (96, 64)) and first.tobytes() != second.tobytes()


@pytest.mark.parametrize("patch", ["ModelSamplingSD3", "ModelSamplingAuraFlow"])
def test_model_sampling_patches_set_the_shift(server, graph, models, patch, pipeline):
    patched = graph.add(patch, model=models[0], shift=5.0)
    save_latent(graph, advanced(graph, models, patched))
    expected = pipeline(PROMPT, seed=7, num_inference_steps=4, height=64, width=96, output_type="latent", shift=5.0)
    assert (latent_of(server, graph) * 0.41407 - expected).abs().max() < 1e-5 * expected.abs().max()


def test_perturbed_attention_guidance_changes_the_picture(server, graph, models):
    save_latent(graph, sample(graph, models))
    plain = latent_of(server, graph)
    graph.remove("SaveLatent")
    patched = graph.add("PerturbedAttentionGuidance", model=models[0], scale=3.0)
    save_latent(graph, sample(graph, (patched, *models[1:])))
    assert (latent_of(server, graph) - plain).abs().max() > 1e-3 * plain.abs().max()


def test_perturbed_attention_guidance_is_the_pipelines(server, graph, models, pipeline):
    save_latent(graph, sample(graph, models, pag_scale=2.0, cfg=5.0))
    options = dict(seed=7, num_inference_steps=4, height=64, width=96, output_type="latent")
    expected = pipeline(PROMPT, pag_guidance_scale=2.0, guidance_scale=5.0, **options)
    assert (latent_of(server, graph) * 0.41407 - expected).abs().max() < 1e-5 * expected.abs().max()
    graph.remove("SaveLatent")
    model = graph.add("SanaPAG", model=models[0], scale=2.0, layers="0, 1", start_percent=0.0, end_percent=1.0)
    save_latent(graph, advanced(graph, models, model))
    expected = pipeline(PROMPT, pag_guidance_scale=2.0, pag_applied_layers=[0, 1], **options)
    assert (latent_of(server, graph) * 0.41407 - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_guidance_interval_is_the_pipelines(server, graph, models, pipeline):
    latent = empty(graph, batch_size=2)
    save_latent(graph, sample(graph, models, latent, guidance_interval_low=0.6, guidance_interval_high=0.95))
    expected = pipeline(
        [PROMPT] * 2, seed=7, num_inference_steps=4, height=64, width=96, output_type="latent",
        guidance_interval=(0.6, 0.95),
    )  # fmt: skip
    assert (latent_of(server, graph) * 0.41407 - expected).abs().max() < 1e-5 * expected.abs().max()


def test_loras_reach_the_linear_layers(server, graph, models, tiny_models):
    up, down = torch.full((192, 2), 0.1), torch.ones(2, 64)
    target = "diffusion_model.blocks.1.attn.qkv"
    (tiny_models / "loras").mkdir(exist_ok=True)
    save_file(
        {f"{target}.lora_up.weight": up, f"{target}.lora_down.weight": down}, tiny_models / "loras" / "tiny.safetensors"
    )
    save_latent(graph, sample(graph, models))
    plain = latent_of(server, graph)
    graph.remove("SaveLatent")
    lora = dict(lora_name="tiny.safetensors", strength_model=1.0)
    patched = graph.add("LoraLoaderModelOnly", model=models[0], **lora)
    save_latent(graph, sample(graph, (patched, *models[1:])))
    assert (latent_of(server, graph) - plain).abs().max() > 1e-3 * plain.abs().max()
    assert "lora key not loaded" not in server.text() and "NOT LOADED" not in server.text()


def test_a_model_merged_with_itself_is_the_same(server, graph, models):
    save_latent(graph, sample(graph, models))
    plain = latent_of(server, graph)
    graph.remove("SaveLatent")
    other = graph.add("SanaDiffusionModelLoader", model_name="tiny.safetensors", dtype="float32")
    merged = graph.add("ModelMergeSimple", model1=models[0], model2=other, ratio=0.25)
    save_latent(graph, sample(graph, (merged, *models[1:])))
    assert (latent_of(server, graph) - plain).abs().max() < 1e-4 * plain.abs().max()


def test_model_save_and_reload(server, graph, models):
    graph.add("ModelSave", model=models[0], filename_prefix="diffusion_models/saved")
    save_latent(graph, sample(graph, models))
    before = latent_of(server, graph)
    (saved,) = (server.base / "output" / "diffusion_models").glob("saved*.safetensors")
    graph.nodes["1"]["inputs"]["model_name"] = saved.name
    graph.remove("ModelSave")
    assert (latent_of(server, graph) == before).all()


def test_vae_save_and_reload(server, graph, models):
    latent = sample(graph, models)
    graph.add("VAESave", vae=models[2], filename_prefix="vae/saved")
    save(graph, graph.add("VAEDecode", samples=latent, vae=models[2]))
    (before,) = pictures_of(server, graph)
    (saved,) = (server.base / "output" / "vae").glob("saved*.safetensors")
    graph.nodes["3"]["inputs"]["vae_name"] = saved.name
    graph.remove("VAESave")
    (after,) = pictures_of(server, graph)
    assert after.tobytes() == before.tobytes()


def test_previews_and_progress_arrive(server, graph, models):
    save_latent(graph, sample(graph, models, steps=5, seed=100))
    run = finished(server, graph)
    assert run.progress == [1, 2, 3, 4, 5]
    assert run.previews >= 5


def test_interrupt_stops_the_sampler(server, graph, models):
    save_latent(graph, sample(graph, models, steps=900, seed=101))
    run = server.run(graph, interrupt_at=3)
    assert run.interrupted
    assert max(run.progress) < 900
    assert server.get("/queue")["queue_running"] == []


def test_image_to_image(server, graph, models):
    image = graph.add("EmptyImage", width=100, height=70, batch_size=1, color=0x3366CC)
    latent = graph.add("SanaDCAEEncode", pixels=image, vae=models[2])
    kept = sample(graph, models, latent, denoise=0.3)
    save(graph, graph.add("VAEDecode", samples=kept, vae=models[2]))
    run = finished(server, graph)
    assert server.images(run)[0].size == (96, 64)
    assert "from 100x70 to 96x64" in run.texts[latent[0]]
    assert "from 100x70 to 96x64" in server.text()


def test_denoise_0_returns_the_latent(server, graph, models):
    image = graph.add("EmptyImage", width=96, height=64, batch_size=1, color=0x3366CC)
    latent = graph.add("SanaDCAEEncode", pixels=image, vae=models[2])
    save_latent(graph, sample(graph, models, latent, denoise=0.0))
    kept = latent_of(server, graph)
    graph.remove("SaveLatent")
    save_latent(graph, latent)
    assert (latent_of(server, graph) == kept).all()


def test_resolution_feeds_the_empty_latent(server, graph, models):
    size = graph.add("SanaResolution", base_size="256", aspect_ratio="1:1 (1024x1024)")
    save_latent(graph, empty(graph, [size[0], 0], [size[0], 1]))
    assert latent_of(server, graph).shape == (1, 32, 8, 8)


def test_scheduler(server, graph, models):
    assert get_sigmas_flow(4, 3.0)[0] < 1
    sigmas = graph.add("SanaScheduler", model=models[0], steps=2, shift=0.0, denoise=0.5, schedule="flow_dpm-solver")
    save_latent(
        graph, advanced(graph, models, sigmas=sigmas, sampler=graph.add("KSamplerSelect", sampler_name="euler"))
    )
    assert latent_of(server, graph).isfinite().all()
