"""What a link brings to a sampler is held to the limits of the sampler's widgets."""

import pytest

NOTHING = dict.fromkeys(["model", "positive", "latent_image"])  # the values are looked at before anything is drawn
GIVEN = {"seed": 0, "steps": 2, "denoise": 1.0}


@pytest.mark.parametrize(
    "values, message",
    [
        ({"steps": "abc"}, "steps is 'abc': expected a whole number from 1 to 1000"),
        ({"steps": 2.5}, "steps is 2.5: expected a whole number"),
        ({"steps": 0}, "steps is 0: expected a whole number from 1"),
        ({"cfg": "x"}, "cfg is 'x': expected a number from 1.0 to 30.0"),
        ({"cfg": float("nan")}, "cfg is nan: expected a number"),
        ({"sampler": "euler"}, "sampler is 'euler': expected one of flow_dpm-solver, flow_euler"),
        ({"seed": 10**23 - 1}, "seed is 9{23}: expected a whole number from 0 to 18446744073709551615"),
        ({"denoise": 7}, "denoise is 7: expected a number from 0.0 to 1.0"),
    ],
)
def test_the_sampler_names_value_and_range(part, values, message):
    given = {**NOTHING, "negative": None, **GIVEN, "cfg": 4, "sampler": "flow_euler"}
    with pytest.raises(ValueError, match=message):
        part("nodes.sampling").SanaSampler.execute(**given | values)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"steps": 5}, "steps is 5: expected a whole number from 1 to 4"),
        ({"guidance": "x"}, "guidance is 'x': expected a number from 0.0 to 20.0"),
        ({"seed": -1}, "seed is -1: expected a whole number from 0"),
        ({"denoise": float("inf")}, "denoise is inf: expected a number"),
    ],
)
def test_so_does_the_sprint_sampler(part, monkeypatch, values, message):
    sprint = part("nodes.sprint")
    monkeypatch.setattr(sprint, "_require_sprint", lambda model: None)
    with pytest.raises(ValueError, match=message):
        sprint.SanaSprintSampler.execute(**NOTHING, **GIVEN | values)


def test_the_ends_of_a_range_and_whole_numbers_for_decimals_pass(part):
    inputs = part("nodes.sampling").SanaSampler.define_schema().inputs
    ends = {"seed": 2**64 - 1, "steps": 1000, "cfg": 1, "denoise": 0, "sampler": "flow_euler"}
    part("nodes.limits").check_values(inputs, **ends)
