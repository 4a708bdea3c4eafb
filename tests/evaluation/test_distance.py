"""FID against the Fréchet distance by hand, and with torch-fidelity's Inception of random weights."""

import builtins

import pytest
import torch
from PIL import Image
from torch import nn

from sana_core.evaluation import distance, frechet_distance

REDS = (10, 20, 30)
OTHER_REDS = (40, 60, 80)


class MeanRed(nn.Module):
    """One feature: the mean of the red channel."""

    num_features = 1

    def forward(self, pixels):
        assert pixels.dtype == torch.uint8
        return pixels[:, 0].float().mean(dim=(1, 2))[:, None]


def write(folder, reds):
    folder.mkdir()
    paths = [folder / f"{red}.png" for red in reds]
    for number, path in enumerate(paths):
        Image.new("RGB", (8 + number, 8), (reds[number], 5, 5)).save(path)
    return paths


def test_distance_of_two_normal_distributions(tmp_path):
    """Means 20 and 60, deviations 10 and 20: (20 - 60)^2 + (10 - 20)^2."""
    pytest.importorskip("torchmetrics")
    pictures, reference = write(tmp_path / "a", REDS), write(tmp_path / "b", OTHER_REDS)
    assert frechet_distance(pictures, reference, MeanRed()) == pytest.approx(1700, abs=0.01)
    assert frechet_distance(reference, reference, MeanRed()) == pytest.approx(0, abs=0.01)


@pytest.mark.slow
def test_distance_of_inceptions_features(tmp_path, monkeypatch):
    """For few pictures Tr sqrt(S1 S2) is the sum of the singular values of their centred features' small product."""
    pytest.importorskip("torchmetrics")
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    monkeypatch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
    with monkeypatch.context() as random:
        random.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        inception = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).eval()
    for parameter in inception.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter)
    torch.save(inception.state_dict(), tmp_path / "inception.pth")
    sets = [write(tmp_path / name, reds) for name, reds in (("a", REDS), ("b", OTHER_REDS))]

    features = [torch.cat([inception(distance._read(path))[0].double() for path in paths]) for paths in sets]
    spread = [(rows - rows.mean(0)) / (len(rows) - 1) ** 0.5 for rows in features]
    cross = torch.linalg.svdvals(spread[0] @ spread[1].T).sum()
    means = (features[0].mean(0) - features[1].mean(0)).square().sum()
    expected = means + spread[0].square().sum() + spread[1].square().sum() - 2 * cross
    found = frechet_distance(*sets, tmp_path / "inception.pth")
    assert found == pytest.approx(expected.item(), rel=1e-3)


def test_one_picture_has_no_covariance(tmp_path):
    (path,) = write(tmp_path / "a", (10,))
    with pytest.raises(ValueError, match="1 pictures are too few"):
        frechet_distance([path], [path, path], MeanRed())
    with pytest.raises(ValueError, match="1 reference pictures are too few"):
        frechet_distance([path, path], [path], MeanRed())


def test_missing_weights_say_where_they_are(tmp_path):
    pytest.importorskip("torchmetrics")
    paths = write(tmp_path / "a", REDS)
    with pytest.raises(FileNotFoundError, match="no Inception weights at .*none.pth.*github.com/toshas/torch-fidelity"):
        frechet_distance(paths, paths, tmp_path / "none.pth")


def test_another_file_is_no_inception(tmp_path):
    pytest.importorskip("torch_fidelity")
    paths = write(tmp_path / "a", REDS)
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth does not hold the weights"):
        frechet_distance(paths, paths, tmp_path / "other.pth")


def test_without_torchmetrics_it_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("torchmetrics"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    paths = write(tmp_path / "a", REDS)
    with pytest.raises(ImportError, match="pip install torchmetrics torch-fidelity"):
        frechet_distance(paths, paths, MeanRed())
