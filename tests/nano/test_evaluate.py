"""The command that scores a folder by its names, and its sheet."""

import numpy as np
import pytest
from PIL import Image

from sana_core.evaluation.scenes import BACKGROUNDS, HELD_OUT, SIZES, Scene, draw
from scripts.nano.evaluate import contact_sheet, main, picture_name

BLANK = np.full((256, 256, 3), BACKGROUNDS[4].rgb, np.uint8)


def test_command_line_scores_a_folder_by_its_names(tmp_path, caplog):
    caplog.set_level("INFO")
    for number, scene in enumerate(HELD_OUT[:3]):
        Image.fromarray(draw(scene)).save(tmp_path / picture_name(scene))
        Image.fromarray(draw(scene)).save(tmp_path / picture_name(scene, number))
    other = next(background for background in BACKGROUNDS if background != HELD_OUT[3].background)
    wrong = Scene(HELD_OUT[3].subject, other, HELD_OUT[3].place, SIZES[0])
    Image.fromarray(draw(HELD_OUT[3])).save(tmp_path / picture_name(wrong, 7))
    scores = main(["--pictures", str(tmp_path), "--sheet", str(tmp_path / "sheet.png")])
    assert (scores.background, scores.place, scores.subject) == (6 / 7, 1, 1)
    assert picture_name(wrong, 7) in caplog.text and "7 pictures: background 85.7%" in caplog.text
    assert Image.open(tmp_path / "sheet.png").width > 8 * 256


@pytest.mark.parametrize("name, found", [("car.png", "''"), ("car-pink-left.png", "'pink'"), ("x-red-left.png", "'x'")])
def test_command_line_refuses_names_of_no_scene(tmp_path, name, found):
    Image.fromarray(BLANK).save(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: {found} is no"):
        main(["--pictures", str(tmp_path)])


def test_command_line_refuses_other_sizes_and_empty_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no PNG"):
        main(["--pictures", str(tmp_path)])
    Image.fromarray(BLANK[:128]).save(tmp_path / "car-red-left.png")
    with pytest.raises(ValueError, match="256x128 pixels"):
        main(["--pictures", str(tmp_path)])


def test_contact_sheet_is_a_grid_with_captions():
    pictures = [draw(scene) for scene in HELD_OUT[:3]]
    sheet = np.asarray(contact_sheet(pictures, ["a panda", "🐼⬅️🟥", ""], columns=2))
    assert sheet.shape == (2 * 288, 2 * 264, 3)
    assert np.array_equal(sheet[4:260, 4:260], pictures[0])
    assert np.array_equal(sheet[4:260, 268:524], pictures[1])
    assert np.array_equal(sheet[292:548, 4:260], pictures[2])
    captions = sheet[262:282, 4:260], sheet[262:282, 268:524], sheet[550:570, 4:260]
    assert [bool((caption < 128).any()) for caption in captions] == [True, True, False]
