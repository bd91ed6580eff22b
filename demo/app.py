#!/usr/bin/env python
"""
A page to draw and edit on: pictures grow scale by scale, schedules are compared, parts are drawn anew.

    python demo/app.py --model model_cards/srdd-fruits64

The model is a folder or Hub id, of a pipeline that draws by class or from texts. Without the option it is that of the
environment variable `SRDD_MODEL`, or the bundled one.
"""

import argparse
import hashlib
import os
import queue
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import torch
from PIL import Image, ImageOps

import srdd
from srdd.pictures import to_rgb
from srdd.schedulers.scheduling_scale import GUIDANCE_SCHEDULES, RESAMPLING_POLICIES


BUNDLED_MODEL = "srdd-fruits64"
SHOWN_SIDE = 512  # small pictures are shown about as large as this
NO_CLASS = -1

Drawing = srdd.SRDDPipeline | srdd.SRDDTextPipeline
CLASS_PIPELINES = (srdd.SRDDPipeline, srdd.SRDDInpaintPipeline, srdd.SRDDSuperResolutionPipeline)
TEXT_PIPELINES = (srdd.SRDDTextPipeline, srdd.SRDDTextInpaintPipeline, srdd.SRDDTextSuperResolutionPipeline)

# What a drawing shows: a line about it, the steps with their captions, and the picture.
Shown = tuple[str, list[tuple[Image.Image, str]], Image.Image | None]

# The runs at hand: the browser session of each, and what stops it.
running: set[tuple[str | None, threading.Event]] = set()


def default_model() -> str:
    """The model of the environment, or the bundled one."""
    here = Path(__file__).resolve().parent  # where it lies in a Space; in the repository it is with the other cards
    places = [here / BUNDLED_MODEL, here.parent / "model_cards" / BUNDLED_MODEL]
    return os.environ.get("SRDD_MODEL") or str(next(filter(Path.is_dir, places), places[0]))


def load(model: str) -> Drawing:
    """A pipeline that draws, by class or from texts as the model does."""
    cls = srdd.SRDDTextPipeline if "text_encoder" in srdd.SRDDPipeline.load_config(model) else srdd.SRDDPipeline
    pipe = cls.from_pretrained(model).to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def scale_name(size: tuple[int, int] | list[int]) -> str:
    return f"{size[0]}×{size[1]}"


class Schedule(NamedTuple):
    """What the schedule's controls say; `None` leaves an option as the model has it."""

    scales: list[str]
    guidance_schedule: str
    temperature: float | None
    top_k: float | None
    top_p: float | None
    resampling_policy: str
    resampling_threshold: float | None
    num_resampling_passes: float | None

    def scheduler(self, model_scheduler: srdd.ScaleScheduler) -> srdd.ScaleScheduler:
        """A scheduler of its own for one request. The first and the last scale are always visited."""
        sizes = model_scheduler.config.scale_sizes
        visited = [size for size in sizes if size in (sizes[0], sizes[-1]) or scale_name(size) in self.scales]
        options = {name: value for name, value in self._asdict().items() if value is not None and name != "scales"}
        for name in ("top_k", "num_resampling_passes"):
            if name in options:
                options[name] = int(options[name])
        return srdd.ScaleScheduler.from_config(model_scheduler.config, scales=visited, **options)


def told(pipe: Drawing, what: int | str, negative: str | None = None) -> dict[str, Any]:
    """The arguments that say what to draw."""
    if isinstance(pipe, TEXT_PIPELINES):
        return {"prompt": what, "negative_prompt": negative or None}
    return {"class_labels": None if what is None or what == NO_CLASS else int(what)}


def shown(picture: Image.Image) -> Image.Image:
    """Enlarged by a whole factor, each pixel a square: [`fitted`] undoes it exactly."""
    factor = max(1, SHOWN_SIDE // max(picture.size))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def fitted(picture: Image.Image | None, size: tuple[int, int]) -> Image.Image:
    """The middle of a picture, made as large as `(height, width)` by means over boxes."""
    if picture is None:
        raise ValueError("There is no picture yet: draw one, or drop one here.")
    return ImageOps.fit(to_rgb(picture), size[::-1], Image.Resampling.BOX)


def painted_mask(layers: list[Image.Image], size: tuple[int, int]) -> Image.Image:
    """White where at least half of a pixel of the model was painted."""
    mask = Image.new("L", size[::-1])
    for layer in layers:
        small = ImageOps.fit(layer.getchannel("A"), size[::-1], Image.Resampling.BOX)
        mask.paste(255, mask=small.point(lambda alpha: 255 if alpha >= 128 else 0))
    if mask.getbbox() is None:
        raise ValueError("Nothing is painted yet: brush over what shall be drawn anew.")
    return mask


def follow(scheduler: srdd.ScaleScheduler, draw: Callable[..., Any], stop: threading.Event) -> Iterator[Shown]:
    """
    Draw in a thread, and show the picture after every pass.

    Args:
        scheduler ([`ScaleScheduler`]): The run's schedule.
        draw (`Callable`): A pipeline's call that lacks nothing but `callback_on_step_end`.
        stop (`threading.Event`): Ends the run after the pass at hand. It is set when nobody follows any more.
    """
    events: queue.Queue = queue.Queue()

    def on_step_end(pipe: Any, index: int, timestep: int, tensors: dict[str, torch.Tensor]) -> dict:
        pipe._interrupt = stop.is_set()
        events.put((index, timestep, pipe.decode_latents(tensors["latents"], "pil")[0]))
        return {}

    def work() -> None:
        try:
            events.put(draw(callback_on_step_end=on_step_end).images[0])
        except Exception as error:
            events.put(error)

    yield "Starting", [], None  # instead of what was drawn before
    start = time.perf_counter()
    threading.Thread(target=work, daemon=True).start()
    steps: dict[tuple[int, int], tuple[Image.Image, str]] = {}  # by window and timestep: the last pass of each scale
    window, last_index, passes = 1, -1, defaultdict(int)
    try:
        while isinstance(event := events.get(), tuple):
            index, timestep, picture = event
            window += index <= last_index
            last_index = index
            key = window, timestep
            passes[key] += 1
            caption = scale_name(scheduler.visit(timestep).size)
            caption += f", pass {passes[key]}" if passes[key] > 1 else ""
            caption = f"window {window}, {caption}" if window > 1 else caption
            steps[key] = shown(picture), caption
            yield f"Drawing: {caption}", list(steps.values()), shown(picture)
    finally:
        was_stopped = stop.is_set()
        stop.set()
    if isinstance(event, Exception):
        raise event
    seconds, ending = time.perf_counter() - start, "Stopped" if was_stopped else "Done"
    done = f"{ending} after {seconds:.1f} s, {sum(passes.values())} passes, {event.width}×{event.height}"
    yield done, list(steps.values()), shown(event)


class Demo:
    """What the page's buttons do with a model. Nothing of a request is kept here or on the pipeline."""

    def __init__(self, pipe: Drawing):
        self.pipe = pipe
        kinds = TEXT_PIPELINES if isinstance(pipe, TEXT_PIPELINES) else CLASS_PIPELINES
        self.draws, self.inpaints, self.enlarges = kinds

    def run(self, cls: type, prepare: Callable[..., tuple], values: tuple, request: Any) -> Iterator[Shown]:
        """
        Draw with a pipeline and a scheduler of the request's own.

        Args:
            cls (`type`): The pipeline's class.
            prepare (`Callable`): Given the pipeline, returns what is to be called, and arguments of its own.
            values (`tuple`): Those of the common controls and of a [`Schedule`].
            request (`gr.Request`, *optional*): Whose Stop ends the run.
        """
        (what, negative, guidance_scale, seed), schedule = values[:4], Schedule(*values[4:])
        run = getattr(request, "session_hash", None), threading.Event()
        running.add(run)
        try:
            scheduler = schedule.scheduler(self.pipe.scheduler)
            pipe = cls.from_pipe(self.pipe, scheduler=scheduler)
            call, options = prepare(pipe)
            generator = torch.Generator().manual_seed(int(seed or 0))
            options |= {"guidance_scale": guidance_scale, "generator": generator, **told(pipe, what, negative)}
            yield from follow(scheduler, partial(call, **options), run[1])
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        finally:
            running.discard(run)

    def draw(self, *values: Any, request: Any = None) -> Iterator[Shown]:
        """Draw with a schedule."""
        return self.run(self.draws, lambda pipe: (pipe, {}), values, request)

    def compare(self, *values: Any, request: Any = None) -> Iterator[tuple]:
        """Draw with two schedules, one after the other, so that their times can be compared."""
        middle, left = 4 + len(Schedule._fields), ("", [], None)
        for left in self.draw(*values[:middle], request=request):
            yield *left, "Waiting", [], None
        if not left[0].startswith("Stopped"):
            for right in self.draw(*values[:4], *values[middle:], request=request):
                yield *left, *right

    def inpaint(self, editor: dict[str, Any] | None, *values: Any, request: Any = None) -> Iterator[Shown]:
        """Draw anew what is painted over."""

        def prepare(pipe: Any) -> tuple[Callable, dict]:
            image = fitted((editor or {}).get("background"), pipe.sample_size)
            return pipe, {"image": image, "mask_image": painted_mask(editor["layers"], pipe.sample_size)}

        return self.run(self.inpaints, prepare, values, request)

    def outpaint(self, editor: dict[str, Any] | None, share: float, *values: Any, request: Any = None) -> Iterator:
        """Continue the picture on all sides, by a share of its own."""

        def prepare(pipe: Any) -> tuple[Callable, dict]:
            image = fitted((editor or {}).get("background"), pipe.sample_size)
            return pipe.outpaint, {"image": image, "padding": max(1, round(share * min(image.size)))}

        return self.run(self.inpaints, prepare, values, request)

    def enlarge(self, picture: Any, reduction: int, factor: int, *values: Any, request: Any = None) -> Iterator[Shown]:
        """Make a picture `reduction` times smaller than those of the model, and that one `factor` times larger."""

        def prepare(pipe: Any) -> tuple[Callable, dict]:
            image = fitted(picture, tuple(max(1, side // reduction) for side in pipe.sample_size))
            return pipe, {"image": image, "scale_factor": factor}

        return self.run(self.enlarges, prepare, values, request)


def stop(request: gr.Request) -> None:
    """End what the session draws, after the pass at hand."""
    for session, event in list(running):
        if session == request.session_hash:
            event.set()


def schedule_controls(pipe: Drawing) -> list[gr.components.Component]:
    """One for each field of [`Schedule`]."""
    scheduler, empty = pipe.scheduler, "Empty: the model's own."
    config = scheduler.config
    temperature, passes = (
        None if isinstance(value, list) else value for value in (config.temperature, config.num_resampling_passes)
    )
    names = [scale_name(size) for size in config.scale_sizes]
    visited = [scale_name(size) for size in scheduler.scales]
    controls = [gr.CheckboxGroup(names, value=visited, label="Scales; the first and the last are always drawn")]
    with gr.Row():
        controls += [
            gr.Radio(list(GUIDANCE_SCHEDULES), value=config.guidance_schedule, label="Guidance over the scales"),
            gr.Number(temperature, label="Temperature", info=empty, minimum=0, step=0.05),
            gr.Number(config.top_k, label="Top-k", info="0 is off.", minimum=0, precision=0),
            gr.Number(config.top_p, label="Top-p", info="1 is off.", minimum=0, maximum=1, step=0.05),
        ]
    with gr.Row():
        controls += [
            gr.Radio(list(RESAMPLING_POLICIES), value=config.resampling_policy, label="Refinement: drawn again"),
            gr.Number(config.resampling_threshold, label="Threshold", info="Of probability.", minimum=0, step=0.01),
            gr.Number(passes, label="Further passes", info=empty, minimum=0, precision=0),
        ]
    return controls


def common_controls(pipe: Drawing) -> list[gr.components.Component]:
    """What to draw, what not, guidance and seed."""
    if isinstance(pipe, srdd.SRDDTextPipeline):
        what, negative = gr.Textbox("", label="Prompt"), gr.Textbox("", label="Negative prompt")
    else:
        names = [(pipe.id2label.get(index, str(index)), index) for index in range(pipe.num_classes)]
        what = gr.Dropdown([("anything", NO_CLASS), *names], value=0 if names else NO_CLASS, label="Class")
        negative = gr.Textbox("", visible=False)
    guidance = gr.Number(pipe.default_guidance_scale, label="Guidance (1 is off)", step=0.5)
    return [what, negative, guidance, gr.Number(0, label="Seed", precision=0, minimum=0)]


def outputs(key: str, columns: int = 5) -> list[gr.components.Component]:
    """Where [`Shown`] goes."""
    status = gr.Markdown(elem_id=f"{key}-status")
    picture = gr.Image(label="Picture", format="png", type="pil", interactive=False, elem_id=f"{key}-picture")
    look = {"show_label": False, "columns": columns, "fit_columns": False, "object_fit": "contain"}
    gallery = gr.Gallery(label="Scale by scale", format="png", elem_id=f"{key}-steps", **look)
    return [status, gallery, picture]


def in_files(value: Any, folder: str) -> Any:
    """
    A drawing, or a part of it, with files in place of pictures: Gradio writes a picture again each time that it is
    shown, and a browser that reads it at that moment shows none.
    """
    if isinstance(value, Image.Image):
        path = Path(folder, f"{value.width}-{hashlib.sha256(value.tobytes()).hexdigest()}.png")
        if not path.exists():
            value.save(path)
        return str(path)
    return type(value)(in_files(each, folder) for each in value) if isinstance(value, (list, tuple)) else value


def button(text: str, key: str, run: Callable, inputs: list, into: list) -> None:
    """A button that draws. Gradio gives a request to parameters that are annotated so."""

    def clicked(request: gr.Request, *values: Any) -> Iterator:
        with tempfile.TemporaryDirectory() as folder:
            for drawing in run(*values, request=request):
                yield in_files(drawing, folder)

    gr.Button(text, variant="primary", elem_id=key).click(clicked, inputs, into, concurrency_limit=4)


def page(pipe: Drawing, title: str) -> gr.Blocks:
    """The page."""
    demo = Demo(pipe)
    with gr.Blocks(title=title, analytics_enabled=False) as blocks:
        gr.Markdown(f"# {title}\nA picture is drawn as a pyramid of token maps, coarse to fine, by `srdd`.")
        with gr.Row():
            common = common_controls(pipe)
        gr.Button("Stop", variant="stop", elem_id="stop").click(stop, queue=False)
        with gr.Accordion("Schedule and refinement", open=False):
            schedule = schedule_controls(pipe)
        with gr.Tab("Draw"):
            action, drawn = gr.Row(), outputs("draw")
            with action:
                button("Draw", "draw", demo.draw, common + schedule, drawn)
                to_editor = gr.Button("Edit it", elem_id="to-editor")
                to_enlarge = gr.Button("Enlarge it", elem_id="to-enlarge")
        with gr.Tab("Compare"):
            with gr.Accordion("The other schedule", open=False):
                other = schedule_controls(pipe)
            action = gr.Row()
            with gr.Row():
                with gr.Column():
                    gr.Markdown("### The schedule above")
                    left = outputs("left", columns=3)
                with gr.Column():
                    gr.Markdown("### The other one")
                    right = outputs("right", columns=3)
            with action:
                button("Compare", "compare", demo.compare, common + schedule + other, left + right)
        with gr.Tab("Edit"):
            editor = gr.ImageEditor(
                label="Brush over what shall be drawn anew", type="pil", format="png", height=640, layers=False,
                sources=("upload",), transforms=(), canvas_size=(SHOWN_SIDE, SHOWN_SIDE), elem_id="editor",
                brush=gr.Brush(default_size=SHOWN_SIDE // 12, colors=["#ff00ff"], color_mode="fixed"),
            )  # fmt: skip
            share = gr.Slider(0.05, 1, value=0.25, label="Outpaint: how far, as a share of the picture")
            action, edited = gr.Row(), outputs("edit")
            with action:
                button("Draw what is painted over", "inpaint", demo.inpaint, [editor, *common, *schedule], edited)
                button("Outpaint", "outpaint", demo.outpaint, [editor, share, *common, *schedule], edited)
        with gr.Tab("Enlarge"):
            with gr.Row():
                picture = gr.Image(label="Picture", type="pil", format="png", elem_id="small")
                reduction = gr.Radio([1, 2, 4], value=4, label="Make it smaller than the model's pictures, times")
                factor = gr.Radio([2, 4], value=4, label="And then larger, times")
            action, enlarged = gr.Row(), outputs("enlarge")
            with action:
                inputs = [picture, reduction, factor, *common, *schedule]
                button("Enlarge", "enlarge", demo.enlarge, inputs, enlarged)
        to_editor.click(lambda picture: picture, drawn[2], editor)
        to_enlarge.click(lambda picture: picture, drawn[2], picture)
        blocks.unload(stop)
    return blocks.queue()


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=default_model(), help="Folder or Hub id of a pipeline.")
    parser.add_argument("--port", type=int, help="Default: the first free one from 7860 on.")
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    page(load(args.model), Path(args.model).name).launch(server_port=args.port)


if __name__ == "__main__":
    main(parse_args())
