// One WebGL viewer for all anomaly volumes of the page: browsers allow few contexts, so it moves to where it is asked for.
//
// A voxel is one point. Under an orthographic camera all voxels look alike, so the fragment shader finds the face of the
// cube that its pixel shows by cutting the pixel's ray with the cube, in the volume's axes. Voxels of a grid that cover
// each other are in the order of their centres, so the depth of a point is exact enough. Voxels come by falling score
// (packing.py): those above a threshold are the first ones.
"use strict";
(() => {
  const VERTEX = `
    attribute vec3 position;
    attribute float level;
    attribute float anomalous;
    uniform mat3 turn;
    uniform vec3 middle;
    uniform vec2 scale;
    uniform float nearness, size;
    uniform bool showTruth, marked;
    uniform vec3 ramp[10], plain, truthColour;
    varying vec3 colour;
    void main() {
      vec3 seen = turn * (position - middle);
      bool drawn = marked ? !showTruth || anomalous > 0.5 : true;
      gl_Position = drawn ? vec4(seen.xy * scale, -seen.z * nearness, 1.0) : vec4(2.0, 2.0, 2.0, 1.0);
      gl_PointSize = size;
      float place = level / 255.0 * 9.0;
      int low = int(min(floor(place), 8.0));
      vec3 scored = mix(ramp[low], ramp[low + 1], place - float(low));
      colour = marked ? (showTruth ? truthColour : scored) : plain;
    }`;
  const FRAGMENT = `
    #ifdef GL_FRAGMENT_PRECISION_HIGH
    precision highp float;
    #else
    precision mediump float;
    #endif
    uniform mat3 turn;
    uniform float reach;
    varying vec3 colour;
    void main() {
      vec2 place = (gl_PointCoord - 0.5) * vec2(2.0, -2.0) * reach;
      vec3 start = vec3(place, 0.0) * turn;
      vec3 way = vec3(0.0, 0.0, -1.0) * turn;
      vec3 facing = vec3(way.x < 0.0 ? -1.0 : 1.0, way.y < 0.0 ? -1.0 : 1.0, way.z < 0.0 ? -1.0 : 1.0);
      way = facing * max(abs(way), 1e-5);
      vec3 enter = (-0.5 * facing - start) / way;
      vec3 leave = (0.5 * facing - start) / way;
      float entered = max(max(enter.x, enter.y), enter.z);
      if (entered > min(min(leave.x, leave.y), leave.z)) discard;
      vec3 normal = turn * (-facing * step(vec3(entered), enter));
      gl_FragColor = vec4(colour * (0.5 + 0.5 * max(dot(normal, vec3(0.3, 0.5, 0.81)), 0.0)), 1.0);
    }`;
  const MAGNIFIED = 16;
  const parts = (id) => document.getElementById(id);
  const settings = JSON.parse(parts("volume-settings").textContent);
  const viewer = parts("viewer");
  const canvas = viewer.querySelector("canvas");
  const said = viewer.querySelector("output");
  const controls = {
    threshold: viewer.querySelector("[name=threshold]"),
    zoom: viewer.querySelector("[name=zoom]"),
    object: viewer.querySelector("[name=object]"),
  };
  const state = { volume: -1, yaw: settings.yaw, pitch: settings.pitch, zoom: 1, threshold: 0, object: "through", drawn: 0 };
  let gl = null, program = null, loaded = null, waiting = false;

  function start() {
    gl = canvas.getContext("webgl", { antialias: false, preserveDrawingBuffer: true });
    if (!gl) return false;
    program = gl.createProgram();
    for (const [kind, source] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, source);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
      if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS) && !gl.isContextLost()) throw new Error(gl.getShaderInfoLog(shader));
    }
    gl.linkProgram(program);
    gl.useProgram(program);
    gl.enable(gl.DEPTH_TEST);
    gl.depthFunc(gl.LEQUAL); // marked voxels are drawn once more, over themselves
    gl.enable(gl.SCISSOR_TEST);
    return true;
  }

  function load(place) {
    const element = parts(`volume-${place}`);
    const about = JSON.parse(element.dataset.about);
    const text = atob(element.textContent.trim());
    const bytes = Uint8Array.from(text, (letter) => letter.charCodeAt(0));
    const { voxels } = about;
    const level = bytes.subarray(6 * voxels, 7 * voxels), anomalous = bytes.subarray(7 * voxels);
    const volume = { ...about, level, anomalous, buffers: [] };
    const inputs = [
      ["position", bytes.subarray(0, 6 * voxels), 3, gl.SHORT], ["level", level, 1, gl.UNSIGNED_BYTE],
      ["anomalous", anomalous, 1, gl.UNSIGNED_BYTE],
    ];
    for (const [name, content, width, kind] of inputs) {
      const buffer = gl.createBuffer(), input = gl.getAttribLocation(program, name);
      gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
      gl.bufferData(gl.ARRAY_BUFFER, content, gl.STATIC_DRAW);
      gl.enableVertexAttribArray(input);
      gl.vertexAttribPointer(input, width, kind, false, 0, 0);
      volume.buffers.push(buffer);
    }
    return volume;
  }

  // Observed voxels at or above the threshold: levels fall, so the first place below it.
  function above(volume, threshold) {
    let low = 0, high = volume.observed;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (volume.level[middle] >= threshold) low = middle + 1; else high = middle;
    }
    return low;
  }

  function draw() {
    waiting = false;
    if (!gl || gl.isContextLost() || !loaded) return;
    const ratio = Math.min(window.devicePixelRatio || 1, 2);
    const width = Math.max(1, Math.round(canvas.clientWidth * ratio)), height = Math.max(1, Math.round(canvas.clientHeight * ratio));
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    const half = width >> 1, side = Math.min(half, height);
    const [sy, cy, sp, cp] = [Math.sin(state.yaw), Math.cos(state.yaw), Math.sin(state.pitch), Math.cos(state.pitch)];
    const rows = [[cy, sy, 0], [-sy * sp, cy * sp, cp], [sy * cp, -cy * cp, sp]];
    const radius = Math.hypot(...loaded.shape) / 2;
    const reach = Math.max(...rows.slice(0, 2).map((row) => row.reduce((sum, value) => sum + Math.abs(value), 0))) / 2;
    const largest = gl.getParameter(gl.ALIASED_POINT_SIZE_RANGE)[1];
    const step = Math.min((side / (2 * radius)) * state.zoom, largest / (2 * reach));
    const uniform = (name) => gl.getUniformLocation(program, name);
    gl.uniformMatrix3fv(uniform("turn"), false, [0, 1, 2].flatMap((column) => rows.map((row) => row[column])));
    gl.uniform3fv(uniform("middle"), loaded.shape.map((length) => (length - 1) / 2));
    gl.uniform2f(uniform("scale"), (2 * step) / half, (2 * step) / height);
    gl.uniform1f(uniform("nearness"), 1 / (radius + 1));
    gl.uniform1f(uniform("size"), 2 * reach * step);
    gl.uniform1f(uniform("reach"), reach);
    gl.uniform3fv(uniform("ramp"), settings.ramp.flat().map((value) => value / 255));
    gl.uniform3fv(uniform("plain"), settings.plain.map((value) => value / 255));
    gl.uniform3fv(uniform("truthColour"), settings.truth.map((value) => value / 255));
    state.drawn = above(loaded, state.threshold);
    for (const truth of [0, 1]) {
      gl.viewport(truth * half, 0, half, height);
      gl.scissor(truth * half, 0, half, height);
      gl.clearColor(...settings.pane.map((value) => value / 255), 1);
      gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
      gl.uniform1i(uniform("showTruth"), truth);
      const all = truth ? loaded.voxels : loaded.observed;
      if (state.object !== "hidden") {
        gl.uniform1i(uniform("marked"), 0);
        gl.drawArrays(gl.POINTS, 0, all);
        if (state.object === "through") gl.clear(gl.DEPTH_BUFFER_BIT);
      }
      gl.uniform1i(uniform("marked"), 1);
      gl.drawArrays(gl.POINTS, 0, truth ? all : state.drawn);
    }
    say();
  }

  function say() {
    const { observed, anomalous, voxels, scale, edge } = loaded;
    let hits = 0, truth = 0;
    for (let place = 0; place < voxels; place++) if (anomalous[place]) { truth++; if (place < state.drawn) hits++; }
    const share = (part, whole) => `${((100 * part) / whole).toFixed(part / whole < 0.0995 ? 1 : 0)} %`;
    const score = scale[0] + ((scale[1] - scale[0]) * state.threshold) / 255;
    let text = `score ≥ ${score.toPrecision(3)}: ${state.drawn.toLocaleString("en")} of ${observed.toLocaleString("en")} voxels`;
    if (truth) text += `, ${share(hits, truth)} of ${settings.marked} and ${share(state.drawn - hits, observed)} of the rest`;
    said.textContent = `${text} (voxels of ${(1000 * edge).toPrecision(2)} mm here)`;
  }

  function redraw() {
    if (!waiting) requestAnimationFrame(draw);
    waiting = true;
  }

  function set(changes) {
    Object.assign(state, changes);
    state.pitch = Math.min(Math.max(state.pitch, -Math.PI / 2), Math.PI / 2);
    state.zoom = Math.min(Math.max(state.zoom, 0.5), MAGNIFIED);
    controls.threshold.value = state.threshold;
    controls.zoom.value = Math.log2(state.zoom);
    controls.object.value = state.object;
    redraw();
  }

  function mount(place) {
    const slot = document.querySelector(`[data-volume="${place}"]`);
    document.querySelectorAll("[data-volume] .still").forEach((still) => (still.hidden = false));
    slot.querySelector(".still").hidden = true;
    slot.append(viewer);
    viewer.hidden = false;
    if (loaded) loaded.buffers.forEach((buffer) => gl.deleteBuffer(buffer));
    loaded = load(place);
    set({ volume: place, threshold: loaded.threshold, yaw: settings.yaw, pitch: settings.pitch, zoom: 1 });
  }

  const pointers = new Map();
  const spread = () => { const [a, b] = [...pointers.values()]; return Math.hypot(a.x - b.x, a.y - b.y) || 1; };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.focus({ preventScroll: true });
    canvas.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
  });
  canvas.addEventListener("pointermove", (event) => {
    const last = pointers.get(event.pointerId);
    if (!last) return;
    const before = pointers.size === 2 ? spread() : 0;
    const [dx, dy] = [event.clientX - last.x, event.clientY - last.y];
    Object.assign(last, { x: event.clientX, y: event.clientY });
    if (pointers.size === 1) set({ yaw: state.yaw - dx * 0.01, pitch: state.pitch + dy * 0.01 });
    if (before) set({ zoom: (state.zoom * spread()) / before });
  });
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (event) => pointers.delete(event.pointerId));
  // Only once it was clicked: else scrolling the page would stop here.
  canvas.addEventListener("wheel", (event) => {
    if (document.activeElement !== canvas) return;
    event.preventDefault();
    set({ zoom: state.zoom * Math.exp(-0.002 * event.deltaY) });
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: ["yaw", 0.1], ArrowRight: ["yaw", -0.1], ArrowUp: ["pitch", -0.1], ArrowDown: ["pitch", 0.1] };
    const zooms = { "+": 1.25, "=": 1.25, "-": 0.8 };
    if (event.key in steps) set({ [steps[event.key][0]]: state[steps[event.key][0]] + steps[event.key][1] });
    else if (event.key in zooms) set({ zoom: state.zoom * zooms[event.key] });
    else return;
    event.preventDefault();
  });
  canvas.addEventListener("dblclick", () => set({ yaw: settings.yaw, pitch: settings.pitch, zoom: 1 }));
  canvas.addEventListener("webglcontextlost", (event) => event.preventDefault());
  canvas.addEventListener("webglcontextrestored", () => { loaded = null; if (start()) mount(state.volume); });
  controls.threshold.addEventListener("input", () => set({ threshold: Number(controls.threshold.value) }));
  controls.zoom.addEventListener("input", () => set({ zoom: 2 ** Number(controls.zoom.value) }));
  controls.object.addEventListener("change", () => set({ object: controls.object.value }));
  const opacity = parts("opacity");
  if (opacity) {
    opacity.disabled = false;
    opacity.addEventListener("input", () => document.documentElement.style.setProperty("--overlay", opacity.value));
  }

  const slots = [...document.querySelectorAll("[data-volume]")];
  if (!slots.length) return;
  if (!start()) return parts("no-webgl").hidden = false;
  for (const slot of slots) {
    const still = slot.querySelector(".still");
    still.disabled = false;
    still.addEventListener("click", () => { mount(Number(slot.dataset.volume)); canvas.focus({ preventScroll: true }); });
  }
  new ResizeObserver(redraw).observe(canvas);
  mount(Number(slots[0].dataset.volume));
  window.volumeViewer = { state, set, mount, draw };
})();
