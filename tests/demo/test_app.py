"""The demo page without a browser: what its buttons do, for models that draw by class and from texts."""

import re
import threading
from itertools import zip_longest
from types import SimpleNamespace

import pytest
import torch
from demo_app import ROOT, load_app
from families import each_family
from PIL import Image
from tiny_models import tiny_pipeline, tiny_scheduler

from srdd import ScaleScheduler


gr = pytest.importorskip("gradio")

app = load_app()


def common(pipe, **changed):
    values = {"what": "red" if "Text" in type(pipe).__name__ else 1, "negative": "", "guidance": 2.0, "seed": 0}
    return tuple({**values, **changed}.values())


def schedule(**changed):
    values = [["1×1", "2×2", "4×4"], "linear", 1.0, 0, 1.0, "none", 0.01, 5]
    return app.Schedule(*values)._replace(**changed)


def pixels(shown):
    return shown[2] and shown[2].tobytes()


def editor(pipe, painted):
    picture = app.shown(Image.new("RGB", pipe.sample_size[::-1], "green"))
    layer = Image.new("RGBA", picture.size)
    layer.paste("#ff00ff", painted)
    return {"background": picture.convert("RGBA"), "layers": [layer], "composite": picture}


@each_family
def test_pictures_grow_scale_by_scale(family):
    pipe = family.pipeline("draw")
    seen = list(app.Demo(pipe).draw(*common(pipe), *schedule()))
    assert [len(steps) for _, steps, _ in seen] == [0, 1, 2, 3, 3]
    status, steps, picture = seen[-1]
    assert [caption for _, caption in steps] == ["1×1", "2×2", "4×4"]
    assert re.fullmatch(r"Done after [\d.]+ s, 3 passes, 8×8", status)
    told = app.told(pipe, *common(pipe)[:2])
    expected = pipe(guidance_scale=2.0, generator=torch.Generator().manual_seed(0), **told).images[0]
    assert app.fitted(picture, (8, 8)).tobytes() == expected.tobytes()
    assert steps[-1][0].tobytes() == picture.tobytes()


def test_what_is_transparent_is_white():
    assert app.fitted(Image.new("RGBA", (16, 16)), (8, 8)).getcolors() == [(64, (255, 255, 255))]


@each_family
def test_schedules_are_compared_without_a_trace_on_the_pipeline(family):
    pipe = family.pipeline("draw")
    config, demo = dict(pipe.scheduler.config), app.Demo(pipe)
    refined = schedule(scales=[], resampling_policy="simple", num_resampling_passes=1)
    seen = list(demo.compare(*common(pipe), *schedule(), *refined))
    assert all(len(values) == 6 for values in seen)
    assert [caption for _, caption in seen[-1][1]] == ["1×1", "2×2", "4×4"]
    assert [caption for _, caption in seen[-1][4]] == ["1×1, pass 2", "4×4, pass 2"]
    assert dict(pipe.scheduler.config) == config
    assert not app.running


@each_family
def test_what_is_painted_over_is_drawn_anew(family):
    pipe = family.pipeline("draw")
    demo = app.Demo(pipe)
    *_, (_, _, picture) = demo.inpaint(editor(pipe, (256, 0, 512, 512)), *common(pipe), *schedule())
    picture = app.fitted(picture, (8, 8))
    green = Image.new("RGB", (4, 8), "green")
    assert picture.crop((0, 0, 4, 8)).tobytes() == green.tobytes()
    assert picture.crop((4, 0, 8, 8)).tobytes() != green.tobytes()
    *_, (status, _, _) = demo.outpaint(editor(pipe, (0, 0, 1, 1)), 0.5, *common(pipe), *schedule())
    assert status.endswith("16×16")


@each_family
def test_pictures_are_enlarged(family):
    pipe = family.pipeline("draw")
    picture = app.shown(Image.new("RGB", (8, 8), "green"))
    *_, (status, _, _) = app.Demo(pipe).enlarge(picture, 2, 4, *common(pipe), *schedule())
    assert status.endswith("16×16")


def test_requests_side_by_side_do_not_disturb_each_other():
    pipe = tiny_pipeline()
    demo, schedules = app.Demo(pipe), [schedule(), schedule(scales=[]), schedule(temperature=0.5, top_k=3)]
    alone = [[pixels(shown) for shown in demo.draw(*common(pipe), *each)] for each in schedules]
    turns = zip_longest(*(demo.draw(*common(pipe), *each) for each in schedules))
    together = [[pixels(shown) for shown in run if shown] for run in zip(*turns)]
    assert together == alone


def test_stop_ends_only_the_runs_of_its_session():
    pipe = tiny_pipeline()
    demo, passes = app.Demo(pipe), schedule(resampling_policy="simple", num_resampling_passes=500)
    mine, other = (SimpleNamespace(session_hash=name) for name in ("mine", "other"))
    stopped, left = (demo.draw(*common(pipe), *passes, request=request) for request in (mine, other))
    for run in (stopped, left, stopped, left):
        next(run)
    threads = threading.active_count()
    app.stop(mine)
    *_, (status, _, picture) = stopped
    assert status.startswith("Stopped after")
    assert picture is not None
    assert next(left)[0].startswith("Drawing")
    left.close()  # the page was closed
    for _ in range(200):
        if threading.active_count() <= threads - 2:
            break
        threading.Event().wait(0.05)
    assert threading.active_count() <= threads - 2
    assert not app.running


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda demo, pipe: demo.draw(*common(pipe), *schedule(top_p=0.0)), "`top_p` must be"),
        (lambda demo, pipe: demo.inpaint(None, *common(pipe), *schedule()), "There is no picture yet"),
        (
            lambda demo, pipe: demo.inpaint(editor(pipe, (0, 0, 9, 9)), *common(pipe), *schedule()),
            "Nothing is painted",
        ),
        (lambda demo, pipe: demo.enlarge(None, 2, 2, *common(pipe), *schedule()), "There is no picture yet"),
    ],
)
def test_what_cannot_be_done_is_said(call, message):
    pipe = tiny_pipeline()
    with pytest.raises(gr.Error, match=message):
        list(call(app.Demo(pipe), pipe))


def test_empty_controls_leave_the_models_own_options():
    own = tiny_scheduler(temperature=[1.0, 0.5, 0.1], num_resampling_passes=[0, 1, 2], resampling_policy="simple")
    given = schedule(temperature=None, num_resampling_passes=None, resampling_policy="simple")
    scheduler = given.scheduler(own)
    assert isinstance(scheduler, ScaleScheduler)
    assert scheduler.temperatures == own.temperatures
    assert scheduler.timesteps.tolist() == own.timesteps.tolist()


def test_the_folder_is_a_space_as_it_stands():
    readme = (ROOT / "demo" / "README.md").read_text(encoding="utf-8")
    listed = (ROOT / "demo" / "requirements.txt").read_text(encoding="utf-8").split()
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    needed = re.findall(r'"(.+?)"', re.search(r"install_requires=\[(.*?)\]", setup, re.DOTALL)[1])
    assert listed == [*needed, *re.findall(r'"(gradio==.+?)"', setup)]
    assert f"sdk_version: {listed[-1].removeprefix('gradio==')}\n" in readme
    assert "app_file: app.py\n" in readme
