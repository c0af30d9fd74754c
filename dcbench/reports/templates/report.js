// All videos run on one clock: rows in view play, and one that drifts runs a little faster or slower until it is back.
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

  const put = (entry, force) => {
    const length = entry.frames / entry.fps;
    const wanted = time % length;
    const speed = Number(byId("speed").value);
    for (const video of entry.videos) {
      let late = wanted - video.currentTime;
      late -= length * Math.round(late / length); // the loop is a circle
      if (force) video.currentTime = (Math.floor(wanted * entry.fps + 1e-6) + 0.5) / entry.fps;
      else if (Math.abs(late) > 0.25) video.currentTime = wanted;
      else video.playbackRate = speed * (1 + Math.max(-0.15, Math.min(0.15, 2 * late)));
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
