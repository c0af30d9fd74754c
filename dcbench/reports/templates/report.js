// All videos run on one clock: rows in view play, and one that drifts runs a little faster or slower until it is back.
// Videos far from the window give their memory back, since a browser keeps only some dozens.
"use strict";
const rows = [...document.querySelectorAll(".row")].map((row) => ({
  row,
  videos: [...row.querySelectorAll("video")],
  files: [...row.querySelectorAll("video")].map((video) => video.getAttribute("src")),
  fps: Number(row.dataset.fps),
  frames: Number(row.dataset.frames),
  means: JSON.parse(row.dataset.means),
  text: row.querySelector("p").textContent.toLowerCase(),
}));
const byId = (id) => document.getElementById(id);
if (rows.length) {
  const entries = new Map(rows.map((entry) => [entry.row, entry]));
  const visible = new Set();
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
      if (!video.readyState) continue; // it is put when its data come
      let late = wanted - video.currentTime;
      late -= length * Math.round(late / length); // the loop is a circle
      if (force) video.currentTime = (Math.floor(wanted * entry.fps + 1e-6) + 0.5) / entry.fps;
      else if (Math.abs(late) > 0.25) video.currentTime = wanted;
      else video.playbackRate = speed * (1 + Math.max(-0.15, Math.min(0.15, 2 * late)));
    }
  };
  const show = (force) => {
    byId("time").value = String(Math.round((1000 * (time % duration)) / duration));
    for (const entry of visible) put(entry, force);
  };
  const start = (entry) => {
    for (const video of entry.videos) {
      video.playbackRate = Number(byId("speed").value);
      if (playing && visible.has(entry)) video.play().catch(() => {});
      else video.pause();
    }
  };
  const setPlaying = (on) => {
    playing = on;
    byId("play").textContent = on ? "Pause all" : "Play all";
    for (const entry of visible) start(entry);
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
  document.addEventListener("keydown", (event) => {
    const at = event.target;
    if (event.ctrlKey || event.metaKey || event.altKey || at.matches("input:not([type=range]), select, textarea")) return;
    if (event.key === " " && !at.matches("button")) setPlaying(!playing);
    else if (event.key === "ArrowLeft" && !at.matches("input")) step(-1);
    else if (event.key === "ArrowRight" && !at.matches("input")) step(1);
    else return;
    event.preventDefault();
  });

  byId("sort").onchange = (event) => {
    const sign = event.target.value.startsWith("-") ? -1 : 1;
    const name = event.target.value.slice(1);
    const value = (entry) => (name in entry.means ? sign * entry.means[name] : Infinity); // clips without one are last
    const ordered = name ? [...rows].sort((a, b) => value(a) - value(b) || 0) : rows;
    for (const entry of ordered) entry.row.parentElement.append(entry.row);
  };
  byId("find").oninput = (event) => {
    const words = event.target.value.toLowerCase().split(/\s+/);
    for (const entry of rows) entry.row.hidden = !words.every((word) => entry.text.includes(word));
    byId("count").textContent = `${rows.filter((entry) => !entry.row.hidden).length} of ${rows.length} clips`;
  };

  const load = (entry) =>
    entry.videos.forEach((video, n) => {
      if (!video.hasAttribute("src")) video.src = entry.files[n];
      video.preload = "auto";
      video.onloadeddata = () => {
        put(entry, true);
        start(entry);
      };
    });
  const unload = (entry) => {
    for (const video of entry.videos) {
      if (video.preload === "none") continue; // it was not loaded
      video.preload = "none";
      video.removeAttribute("src");
      video.load();
    }
  };
  const near = new IntersectionObserver(
    (changes) => {
      for (const change of changes) (change.isIntersecting ? load : unload)(entries.get(change.target));
    },
    { rootMargin: "600px" },
  );
  const seen = new IntersectionObserver((changes) => {
    for (const change of changes) {
      const entry = entries.get(change.target);
      if (change.isIntersecting) visible.add(entry);
      else visible.delete(entry);
      start(entry);
      if (change.isIntersecting) put(entry, true);
    }
  });
  for (const entry of rows) {
    near.observe(entry.row);
    seen.observe(entry.row);
  }
}
