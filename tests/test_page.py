"""The service's page in a browser: what it shows is so, and everybody can use it."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import Seen, launched, opened_page, serious
from oracle import Checkpoint
from served import create, get, serving, small_model, wait_done
from test_server import picture

from cineline.families.wan.random_checkpoint import RandomConfig
from cineline.server.model import takes_of
from training.scenes import COLOURS, MOTIONS, SHAPES

KEY = "a key of sixteen or more"
HOSTILE = '<img src=x onerror=alert(1)> & "quotes" \'</script>'
SIZES = [(390, 844), (1280, 900)]
SLOW_S = 0.3
"""Of a step, where something is to be seen while it runs."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as browser:
        yield browser


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(checkpoint(RandomConfig("ti2v", seed=3)), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def slow_service(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with serving(model, tmp_path_factory.mktemp("slow") / "data", step_s=SLOW_S) as client:
        yield client


@pytest.fixture
def slow(slow_service: httpx.Client) -> Iterator[httpx.Client]:
    """A service whose steps take their time, without jobs."""
    yield slow_service
    delete_all(slow_service)


def card(seen: Seen, job: str) -> Any:
    return seen.page.locator(f"#{job}")


def jobs_of(client: httpx.Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.get("/v1/videos").json()["data"]
    return found


def delete_all(client: httpx.Client) -> None:
    for job in jobs_of(client):
        client.delete(f"/v1/videos/{job['id']}")


def state(job: str, *states: str) -> str:
    return f"{json.dumps(states)}.includes(document.getElementById('{job}')?.dataset.state)"


def test_one_video_is_watched_and_played_and_the_other_cancelled(browser: Any, slow: httpx.Client) -> None:
    with opened_page(browser, slow) as seen:
        page = seen.page
        page.wait_for_selector("#connection[data-state=live]")
        assert page.locator("#empty").is_visible()
        page.locator("#empty button").click()
        assert page.locator("#prompt").input_value()
        page.get_by_label("What it shows").fill(HOSTILE)
        page.get_by_text("Advanced").click()
        page.get_by_label("Steps").fill("8")
        for _ in range(2):
            with page.expect_response("**/v1/videos"):
                page.get_by_role("button", name="Make the video").click()
            page.wait_for_selector("#submit:not([aria-disabled])")
        second, first = [job["id"] for job in jobs_of(slow)]
        assert get(slow, first)["prompt"] == HOSTILE
        assert card(seen, first).locator("h3").inner_text() == HOSTILE
        assert not page.locator("#empty").is_visible()
        seen.wait(f"(v => v > 0 && v < 60)(document.querySelector('#{first} progress').value)")
        before = page.evaluate(f"document.querySelector('#{first} progress').value")
        card(seen, second).get_by_role("button", name="Cancel").click()
        card(seen, second).wait_for(state="detached")
        assert slow.get(f"/v1/videos/{second}").status_code == 404
        seen.wait(f"document.querySelector('#{first} progress').value > {before}")
        page.wait_for_selector(f"#{first} img.preview")
        seen.wait(state(first, "completed"))
        assert "is done" in page.locator("#heard").inner_text()
        card(seen, first).get_by_role("button", name="Play", exact=False).last.click()
        seen.wait(f"document.querySelector('#{first} video')?.currentTime > 0")
        with page.expect_download() as saved:
            card(seen, first).get_by_role("button", name="Download").click()
        assert Path(saved.value.path()).read_bytes() == slow.get(f"/v1/videos/{first}/content").content
        remove = card(seen, first).get_by_role("button", name="Delete")
        remove.click()
        assert get(slow, first)["status"] == "completed"  # it asks once more
        card(seen, first).get_by_role("button", name="Really delete").click()
        card(seen, first).wait_for(state="detached")
        assert jobs_of(slow) == []


def test_it_works_by_keyboard_alone(browser: Any, slow: httpx.Client) -> None:
    with opened_page(browser, slow) as seen:
        page = seen.page
        page.wait_for_selector("#connection[data-state=live]")

        def tab_to(selector: str, key: str = "Tab") -> None:
            for _ in range(60):
                page.keyboard.press(key)
                if page.evaluate("(it) => document.activeElement.matches(it)", selector):
                    return
            pytest.fail(f"{selector} cannot be reached.")

        tab_to("#prompt")
        page.keyboard.type("a cat")
        page.keyboard.press("Control+Enter")
        page.wait_for_selector(".card")
        tab_to("#back")
        page.keyboard.press("ArrowLeft")  # from right to left, as time goes
        page.keyboard.press("ArrowLeft")
        assert seen.modules("(main) => main.picture.heldAt !== null")
        tab_to("#live")
        page.keyboard.press("Enter")
        assert seen.modules("(main) => main.picture.heldAt === null")
        tab_to(".card .actions button")
        page.keyboard.press("Enter")
        page.locator(".card").wait_for(state="detached")
        assert page.evaluate("document.activeElement.id") == "jobs-title"
        assert jobs_of(slow) == []


def test_errors_are_said_beside_their_fields(browser: Any, slow: httpx.Client) -> None:
    with opened_page(browser, slow) as seen:
        page = seen.page
        page.wait_for_selector("#connection[data-state=live]")

        def refused(field: str) -> str:
            page.get_by_role("button", name="Make the video").click()
            page.wait_for_selector(f"#{field}[aria-invalid=true]")
            assert page.evaluate("document.activeElement.id") == field
            words: str = page.locator(f"#{field}-problem").inner_text()
            return words

        assert "empty" in refused("prompt")
        page.locator("#prompt").fill("a cat")
        assert page.locator("#prompt-problem").count() == 0
        page.locator("#size").select_option("other")
        page.locator("#width").fill("33")
        assert "multiple" in refused("width")
        page.locator("#width").fill("")
        page.locator("#seed").fill("many")
        assert "whole number" in refused("seed")
        page.locator("#seed").fill("")
        page.locator("#advanced").evaluate("(it) => it.open = true")
        page.locator("#num_frames").fill("6")
        page.locator("#advanced").evaluate("(it) => it.open = false")
        assert "4k+1" in refused("num_frames")
        assert jobs_of(slow) == []


def drop(seen: Seen, content: bytes, kind: str) -> None:
    """A file from outside, let go somewhere on the page."""
    script = """([bytes, type]) => {
        const carried = new DataTransfer();
        carried.items.add(new File([new Uint8Array(bytes)], "first", { type }));
        for (const name of ["dragover", "drop"]) {
            const how = { dataTransfer: carried, bubbles: true, cancelable: true };
            document.body.dispatchEvent(new DragEvent(name, how));
        }
    }"""
    seen.page.evaluate(script, [list(content), kind])


def test_a_first_frame_is_dropped_and_comes_along_again(browser: Any, slow: httpx.Client) -> None:
    with opened_page(browser, slow) as seen:
        page = seen.page
        page.wait_for_selector("#connection[data-state=live]")
        drop(seen, b"some words", "text/plain")
        assert "no picture" in page.locator("#image-problem").inner_text()
        drop(seen, picture(), "image/png")
        page.wait_for_selector("#image-chosen:visible")
        page.locator("#prompt").fill("it turns")
        page.locator("#seed").fill("7")
        page.get_by_role("button", name="Make the video").click()
        page.wait_for_selector(".card")
        page.get_by_role("button", name="again with another seed").click()
        seen.wait("document.querySelectorAll('.card').length === 2")
        second, first = jobs_of(slow)
        assert first["seed"] == 7 and second["seed"] != 7
        for job in (first, second):
            assert slow.get(f"/v1/videos/{job['id']}/settings").json()["images"] == ["image"]
        page.reload()  # the page has the picture no more, and the service gives none back
        page.wait_for_selector("#connection[data-state=live]")
        card(seen, first["id"]).get_by_role("button", name="again with another seed").click()
        page.wait_for_selector("#image[aria-invalid=true]")
        assert page.locator("#prompt").input_value() == "it turns"
        assert len(jobs_of(slow)) == 2


def test_again_with_another_seed_keeps_all_else(browser: Any, slow: httpx.Client) -> None:
    given = {"num_frames": 9, "size": "64x32", "flow_shift": 4.0, "negative_prompt": "a dog", "seed": 7}
    first = create(slow, **given)
    with opened_page(browser, slow) as seen:
        card(seen, first["id"]).get_by_role("button", name="again with another seed").click()
        seen.wait("document.querySelectorAll('.card').length === 2")
        card(seen, first["id"]).get_by_text("Its way and settings").click()
        seen.page.wait_for_selector(f"#{first['id']} dl dd")
        shown = card(seen, first["id"]).locator("dl").inner_text()
        assert all(words in shown for words in ("Flow shift", "a dog", "64x32", "Seed"))
    second, same = jobs_of(slow)
    fields = [slow.get(f"/v1/videos/{job['id']}/settings").json()["fields"] for job in (same, second)]
    assert fields[0].pop("seed") != fields[1].pop("seed")
    assert fields[0] == fields[1]


def test_a_newcomer_is_told_what_the_mini_models_draw(browser: Any, slow: httpx.Client) -> None:
    from cineline.engine.hub import open_model

    takes = takes_of(open_model("mini-ti2v"), {}).model_dump()
    with opened_page(browser, slow) as seen:
        seen.page.wait_for_selector("#connection[data-state=live]")
        words = seen.page.evaluate("import('/page/words.js').then((it) => [it.COLOURS, it.SHAPES, it.MOTIONS])")
        moves = [each if each in ("growing", "shrinking") else f"moving {each}" for each in MOTIONS]
        assert words == [list(COLOURS), list(SHAPES), moves]
        seen.modules("(main, timeline, line, colours, takes) => main.form.fit(takes)", takes)
        prompts = seen.page.locator("#examples button").all_inner_texts()
        assert len(prompts) == 3 and all(prompt.endswith("background") for prompt in prompts)
        assert "circle, square or triangle" in seen.page.locator("#prompt-help").inner_text()
        assert seen.page.locator("#size option").all_inner_texts()[0] == "Own, 128×128"


def busy(client: httpx.Client) -> list[str]:
    """One video that is done, one in the line, one that waits, one that has failed."""
    jobs = [create(client, prompt="a cat", num_inference_steps=1)["id"]]
    wait_done(client, jobs[0])
    jobs.append(create(client, prompt="too late", timeout_s=0.1, num_inference_steps=40)["id"])
    wait_done(client, jobs[1])
    jobs += [create(client, prompt=f"number {each}", num_inference_steps=40, preview=1)["id"] for each in range(6)]
    return jobs


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_use_it(scheme: str, browser: Any, slow: httpx.Client) -> None:
    """Empty and busy, with all that unfolds: axe-core finds nothing serious, and nothing is wider than the screen."""
    for width, height in SIZES:
        options = {"color_scheme": scheme, "viewport": {"width": width, "height": height}}
        with opened_page(browser, slow, **options) as seen:
            page = seen.page
            page.wait_for_selector("#connection[data-state=live]")
            assert serious(page) == []
            done, failed, running, *_ = busy(slow)
            seen.wait(state(failed, "failed"))
            page.wait_for_selector(f"#{running} img.preview")
            assert "timeout_s" in card(seen, failed).locator(".problem").text_content()
            page.evaluate("for (const it of document.querySelectorAll('details')) it.open = true")
            card(seen, done).get_by_role("button", name="Play", exact=False).last.click()
            seen.wait(f"document.querySelector('#{done} video')?.currentTime > 0")
            seen.wait("document.querySelector('#table tr td')")
            assert serious(page) == []
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            page.evaluate("document.querySelector('label[for=prompt]').remove()")
            assert serious(page) != []  # it would find something
            delete_all(slow)


def test_a_key_is_asked_for_and_kept_in_the_session_alone(browser: Any, model: Path, tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_text(f'[keys.me]\nkey = "{KEY}"\n[keys.other]\nkey = "{KEY} of another"\n')
    with serving(model, tmp_path / "data", api_keys=tmp_path / "keys.toml") as client:
        client.headers["Authorization"] = f"Bearer {KEY} of another"
        create(client, prompt="a secret")
        client.headers["Authorization"] = f"Bearer {KEY}"
        with opened_page(browser, client) as seen:
            page = seen.page
            for given in ("a wrong one, long enough", KEY):
                page.wait_for_selector("#key-dialog[open]")
                assert serious(page) == []
                page.keyboard.press("Escape")
                assert page.locator("#key-dialog").is_visible()
                page.locator("#key").fill(given)
                page.keyboard.press("Enter")
                if given != KEY:
                    seen.wait("document.getElementById('key-problem').textContent.includes('not know')")
            page.wait_for_selector("#connection[data-state=live]")
            job = create(client)["id"]
            seen.wait(state(job, "completed"))
            seen.wait(f"document.querySelector('#{job} .poster img')?.naturalWidth > 0")
            card(seen, job).get_by_role("button", name="Play", exact=False).last.click()
            seen.wait(f"document.querySelector('#{job} video')?.currentTime > 0")
            assert page.locator(".card").count() == 1
            kept = page.evaluate("[Object.values(sessionStorage), localStorage.length, document.cookie]")
            assert kept == [[KEY], 0, ""]
            page.reload()
            seen.wait(state(job, "completed"))  # without asking
            page.get_by_role("button", name="Forget the key").click()
            page.wait_for_selector("#key-dialog[open]")
            assert page.evaluate("sessionStorage.length") == 0


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def test_a_stream_that_breaks_is_joined_again_without_a_lost_state(browser: Any, model: Path, tmp_path: Path) -> None:
    """The service ends and begins again under the page; meanwhile, and before the page is back, things happen."""
    data, port = tmp_path / "data", free_port()
    with serving(model, data, step_s=SLOW_S, port=port) as client:
        opened = opened_page(browser, client)
        seen = opened.__enter__()
        seen.page.wait_for_selector("#connection[data-state=live]")
        jobs = [create(client, num_inference_steps=6, seed=seed)["id"] for seed in range(3)]
        seen.wait(state(jobs[0], "denoising"))
        seen.page.evaluate("window.sameLoad = true")
    seen.page.wait_for_selector("#connection[data-state=joining]")
    assert seen.page.locator(".card").count() == 3
    seen.page.context.set_offline(True)  # so that it is not back before all of this
    with serving(model, data, port=port) as client:
        wait_done(client, jobs[0])
        client.delete(f"/v1/videos/{jobs[1]}")
        late = create(client, prompt="meanwhile")["id"]
        wait_done(client, late)
        assert seen.page.locator(".card").count() == 3
        seen.page.context.set_offline(False)
        seen.page.wait_for_selector("#connection[data-state=live]")
        for job in (jobs[0], jobs[2], late):
            seen.wait(state(job, "completed"))
        order = seen.page.evaluate("Array.from(document.querySelectorAll('.card'), (it) => it.id)")
        assert order == [each["id"] for each in jobs_of(client)] == [late, jobs[2], jobs[0]]
        assert seen.page.evaluate("window.sameLoad")
        opened.__exit__(None, None, None)


DRAWN = """(main, timeline, line, colours, from, to) => {
    // The picture stands still at these microseconds; each slice with where it is, and whether it is of its colour.
    const { picture } = main;
    picture.span.value = "30";
    picture.heldAt = to;
    picture.touch();
    return new Promise((resolve) => setTimeout(() => {
        const view = picture.view;
        const scale = picture.canvas.width / picture.width;
        const one = new OffscreenCanvas(1, 1).getContext("2d");
        resolve({ view, width: picture.width, rows: main.timeline.ranks.map((row, rank) =>
            timeline.laidOut(row, view.from, view.to, picture.width).map(({ slice, x, width }) => {
                one.fillStyle = colours.colourOf(slice.video, slice.kind);
                one.fillRect(0, 0, 1, 1);
                const at = [(x + width / 2) * scale, (rank * 40 + 2) * scale];
                const pixel = picture.context.getImageData(...at.map(Math.floor), 1, 1).data;
                const own = one.getImageData(0, 0, 1, 1).data;
                return { slice, x, width, same: own.every((value, part) => Math.abs(value - pixel[part]) < 3) };
            })) });
    }, 200));
}"""


def test_the_picture_is_the_trace_of_the_same_run(browser: Any, model: Path, tmp_path: Path) -> None:
    """The same slices: rank, request, kind, number and times; drawn where they belong, in their video's colour."""
    trace = tmp_path / "trace.json"
    with serving(model, tmp_path / "data", trace=trace, step_s=0.2) as client, opened_page(browser, client) as seen:
        seen.page.wait_for_selector("#connection[data-state=live]")
        jobs = [create(client, seed=seed, num_inference_steps=6)["id"] for seed in (1, 2, 3)]
        for job in jobs:
            wait_done(client, job)
        seen.modules(
            """async (main) => {
                const decoded = (job) => main.timeline.of(job).flat().filter((each) => each.kind === "decode").length;
                while (!given.every((job) => decoded(job) === 4)) await new Promise((go) => setTimeout(go, 50));
            }""".replace("given.every", f"{json.dumps(jobs)}.every")
        )
        newest = seen.modules("(main) => main.timeline.newest")
        drawn = seen.modules(DRAWN, 0, newest + 1e6)
    events = [each for each in json.loads(trace.read_text())["traceEvents"] if each["ph"] == "X"]
    shown = [each for row in drawn["rows"] for each in row]
    assert len(shown) == len(events)
    begin_us = min(each["slice"]["start"] for each in shown)
    per_us = drawn["width"] / (drawn["view"]["to"] - drawn["view"]["from"])
    at = (begin_us - drawn["view"]["from"]) * per_us

    def name_of(piece: dict[str, Any]) -> str:
        kind, request = piece["kind"], f"r{jobs.index(piece['video'])}"
        if kind == "denoise":
            return f"{request} step {piece['number']} {piece['branch']}"
        return f"{request} {kind} {piece['number']}" if kind == "decode" else f"{request} {kind}"

    shown.sort(key=lambda each: (each["slice"]["rank"], each["slice"]["start"]))
    events.sort(key=lambda each: (each["tid"], each["ts"]))
    for mine, wanted in zip(shown, events, strict=True):
        piece = mine["slice"]
        assert (piece["rank"], name_of(piece), piece["took"]) == (wanted["tid"], wanted["name"], wanted["dur"])
        assert piece["start"] - begin_us == pytest.approx(wanted["ts"], abs=1.001)
        assert mine["x"] == pytest.approx(at + wanted["ts"] * per_us, abs=0.01)
        assert mine["width"] == pytest.approx(wanted["dur"] * per_us, abs=0.01)
    wide = [each for each in shown if each["width"] > 3]
    assert len(wide) > 6 and all(each["same"] for each in wide)


def test_a_slice_is_read_and_its_video_followed(browser: Any, slow: httpx.Client) -> None:
    jobs = [create(slow, prompt=f"number {each}", num_inference_steps=40)["id"] for each in range(2)]
    with opened_page(browser, slow) as seen:
        page = seen.page
        page.locator("#table-details").evaluate("(it) => it.open = true")
        seen.wait("document.querySelector('#table tr td + td')?.textContent.startsWith('denoise')")
        assert "number" in page.locator("#table").inner_text()
        seen.wait("document.querySelector('.share').textContent.endsWith('%')")
        share = "(main) => main.timeline.busy(0, main.timeline.newest)"
        while not 0.5 < seen.modules(share) <= 1:  # two requests, and each step is asleep on this rank
            page.wait_for_timeout(100)
        where = """(main, timeline) => {
            const { view, width } = main.picture;
            const found = timeline.laidOut(main.timeline.ranks[0], view.from, view.to, width).at(-2);
            return [found.x + found.width / 2, found.slice.video];
        }"""
        main: Callable[[str], Any] = seen.modules
        main("(main) => { main.picture.heldAt = main.timeline.newest; main.picture.touch(); }")
        x, video = main(where)
        page.locator("#canvas").click(position={"x": x, "y": 10})
        assert "step" in page.locator("#pointed").inner_text()
        assert video in jobs and main("(main) => main.picture.chosen") == video
        assert "chosen" in card(seen, video).get_attribute("class")
        card(seen, video).get_by_text("Its way and settings").click()
        alone = card(seen, video).get_by_role("button", name="alone in the line")
        assert alone.get_attribute("aria-pressed") == "true"
        seen.wait(f"document.querySelector('#{video} canvas').ariaLabel?.includes('slices on 2 ranks')")
        alone.click()
        assert main("(main) => main.picture.chosen") is None


@pytest.mark.parametrize(("motion", "least", "most"), [("reduce", 1, 5), ("no-preference", 8, 1000)])
def test_the_picture_moves_only_where_motion_is_wanted(
    motion: str, least: int, most: int, browser: Any, slow: httpx.Client
) -> None:
    create(slow, num_inference_steps=40)
    with opened_page(browser, slow, reduced_motion=motion) as seen:
        seen.wait("document.querySelector('.share')?.textContent.endsWith('%')")
        script = """(main) => new Promise((resolve) => {
            const drawn = new Set();
            const began = performance.now();
            const look = (now) => {
                drawn.add(main.picture.drawn);
                if (now - began < 3000) requestAnimationFrame(look);
                else resolve(drawn.size);
            };
            requestAnimationFrame(look);
        })"""
        assert least <= seen.modules(script) <= most


def test_what_others_delete_goes_when_the_page_looks_again(browser: Any, slow: httpx.Client) -> None:
    jobs = [create(slow, num_inference_steps=1, seed=seed)["id"] for seed in range(2)]
    for job in jobs:
        wait_done(slow, job)
    with opened_page(browser, slow) as seen:
        seen.wait(state(jobs[0], "completed"))
        slow.delete(f"/v1/videos/{jobs[0]}")
        seen.modules("(main) => main.jobs.sync()")
        assert seen.page.evaluate("Array.from(document.querySelectorAll('.card'), (it) => it.id)") == jobs[1:]


def test_older_videos_are_fetched_when_they_are_asked_for(browser: Any, model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path / "data", step_s=SLOW_S) as client, opened_page(browser, client) as seen:
        seen.page.wait_for_selector("#connection[data-state=live]")
        assert not seen.page.locator("#older").is_visible()
        seen.modules("(main) => { main.jobs.loaded = 0; main.jobs.more = true; main.jobs.changed(); }")
        job = create(client)["id"]
        seen.page.get_by_role("button", name="Show older ones").click()
        seen.wait(f"document.getElementById('{job}')")
        seen.page.locator("#older").wait_for(state="hidden")
