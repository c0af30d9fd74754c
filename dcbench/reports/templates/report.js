// All videos run on one clock: it plays rows in view, and puts a video back when it has drifted by half a frame.
"use strict";
const rows = [...document.querySelectorAll(".row")].map((row) => ({
  row,
  videos: [...row.querySelectorAll("video")],
  fps: Number(row.dataset.fps),
  frames: Number(row.dataset.frames),
  visible: false,
}));
const byId = (id) => document.getElementById(id);
if (rows.length) {
  const longest = rows.reduce((a, b) => (a.frames / a.fps > b.frames / b.fps ? a : b));
  const duration = longest.frames / longest.fps;
  let playing = false;
  let time = 0;
  let last = 0;

  const place = (entry, video) => {
    const length = entry.frames / entry.fps;
    const frame = Math.floor((time % length) * entry.fps + 1e-6);
    return (frame + 0.5) / entry.fps;
  };
  const put = (entry, force) => {
    for (const video of entry.videos) {
      const length = entry.frames / entry.fps;
      const apart = Math.abs(video.currentTime - (time % length));
      if (force) video.currentTime = place(entry, video);
      else if (Math.min(apart, length - apart) > 0.5 / entry.fps + 0.08) video.currentTime = time % length;
    }
  };
  const show = (force) => {
    byId("time").value = String(Math.round((1000 * (time % duration)) / duration));
    for (const entry of rows) if (entry.visible) put(entry, force);
  };
  const setPlaying = (on) => {
    playing = on;
    byId("play").textContent = on ? "Pause all" : "Play all";
    for (const entry of rows) {
      for (const video of entry.videos) {
        video.playbackRate = Number(byId("speed").value);
        if (on && entry.visible) video.play().catch(() => {});
        else video.pause();
      }
    }
    last = performance.now();
    if (on) requestAnimationFrame(tick);
    else show(true);
  };
  const tick = (now) => {
    if (!playing) return;
    time = (time + ((now - last) / 1000) * Number(byId("speed").value)) % duration;
    last = now;
    show(false);
    requestAnimationFrame(tick);
  };
  const step = (frames) => {
    if (playing) setPlaying(false);
    const index = Math.floor(time * longest.fps + 1e-6) + frames;
    time = ((index + longest.frames) % longest.frames) / longest.fps;
    show(true);
  };

  byId("play").onclick = () => setPlaying(!playing);
  byId("back").onclick = () => step(-1);
  byId("on").onclick = () => step(1);
  byId("time").oninput = (event) => {
    if (playing) setPlaying(false);
    time = Math.min((Number(event.target.value) / 1000) * duration, duration - 1e-3);
    show(true);
  };
  byId("speed").onchange = () => setPlaying(playing);
  byId("size").oninput = (event) => document.documentElement.style.setProperty("--size", `${event.target.value}px`);

  const seen = new IntersectionObserver((changes) => {
    for (const change of changes) {
      const entry = rows.find((candidate) => candidate.row === change.target);
      entry.visible = change.isIntersecting;
      for (const video of entry.videos) {
        if (playing && entry.visible) video.play().catch(() => {});
        else video.pause();
      }
      if (entry.visible) put(entry, true);
    }
  });
  for (const entry of rows) seen.observe(entry.row);
}
