// The page: sends requests to the HTTP API of its own service and displays the responses.

const byId = (id) => document.getElementById(id);
// Larger photos are downscaled before upload, so that measuring them takes seconds.
const MAX_SIDE = 640;

class ApiError extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

async function request(path, options = {}) {
  const token = sessionStorage.getItem("token");
  const headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  const response = await fetch(path, { ...options, headers }).catch((error) => {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "the service does not respond");
  });
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  throw new ApiError(response.status, body.error ?? `the service returned status ${response.status}`);
}

function setStatus(id, text, isError = false) {
  byId(id).textContent = text;
  byId(id).classList.toggle("fault", isError);
}

// Models -------------------------------------------------------------------------------------------------------------

let models = [];

async function loadModels() {
  try {
    ({ models } = await (await request("v1/models")).json());
  } catch (error) {
    byId("access").hidden = error.status !== 401;
    byId("loading").hidden = error.status === 401;
    if (error.status === 401) byId("token").focus();
    else setTimeout(loadModels, 2000);
    return;
  }
  byId("access").hidden = true;
  byId("loading").hidden = models.every((model) => model.ready);
  updateModelSelect("compress", "codec", new Option("automatic, by file type", ""));
  updateModelSelect("generate", "generator");
  byId("codec-row").hidden = byId("codec").options.length < 3;
  // Input stays while other models are still loading.
  if (byId("generator").value !== selectedGenerator) showClasses();
  if (models.some((model) => !model.ready)) setTimeout(loadModels, 2000);
}

// Sections have the names of capabilities as their ids.
function updateModelSelect(capability, select, ...otherOptions) {
  const capable = models.filter((model) => model.ready && model.capabilities.includes(capability));
  const selected = byId(select).value;
  byId(select).replaceChildren(...otherOptions, ...capable.map((model) => new Option(model.name, model.name)));
  if (capable.some((model) => model.name === selected)) byId(select).value = selected;
  byId(capability).hidden = capable.length === 0;
}

byId("access").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", byId("token").value.trim());
  loadModels();
});

// Compression --------------------------------------------------------------------------------------------------------

const formatBytes = (count) => (count < 10000 ? `${count}` : `${Math.round(count / 100) / 10} k`);
const objectUrls = new Map();
// Responses to any but the latest request are discarded.
let latestRequest = 0;

function setObjectUrl(id, attribute, blob) {
  if (objectUrls.has(id)) URL.revokeObjectURL(objectUrls.get(id));
  objectUrls.set(id, URL.createObjectURL(blob));
  byId(id)[attribute] = objectUrls.get(id);
}

function showMetrics(entries) {
  byId("metrics").replaceChildren(...entries.map(([name, value]) => {
    const entry = document.createElement("div");
    for (const [tag, text] of [["dt", name], ["dd", value]]) {
      entry.append(Object.assign(document.createElement(tag), { textContent: text }));
    }
    return entry;
  }));
}

// A canvas would keep the first frame of an animation only. The service decides whether such a file is one.
async function mayBeAnimated(file) {
  const start = new TextDecoder("latin1").decode(await file.slice(0, 2 ** 16).arrayBuffer());
  const marker = { GIF8: "", RIFF: "ANIM", "\x89PNG": "acTL" }[start.slice(0, 4)];
  return marker === undefined ? start.slice(4, 12) === "ftypavis" : start.includes(marker);
}

async function prepareUpload(file) {
  const bitmap = await createImageBitmap(file).catch(() => null);
  // The service detects the format itself; the browser guesses a type from the name, which can be wrong.
  if (!bitmap || await mayBeAnimated(file)) return { blob: new Blob([file]), isScaled: false, isVisible: bitmap !== null };
  const factor = MAX_SIDE / Math.max(bitmap.width, bitmap.height);
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * Math.min(1, factor)));
  canvas.height = Math.max(1, Math.round(bitmap.height * Math.min(1, factor)));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  // Transparent pixels become white, as in the service.
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  return { blob, isScaled: factor < 1, isVisible: true, size: `${canvas.width} × ${canvas.height}` };
}

async function openUpload(file) {
  const requestId = ++latestRequest;
  byId("result").hidden = true;
  byId("sizes").hidden = true;
  for (const id of ["original-video", "decoded-video"]) byId(id).pause();
  try {
    const signature = new TextDecoder().decode(await file.slice(0, 4).arrayBuffer());
    if (signature === "BSQ1") await openBsqFile(file, requestId);
    else await openOriginal(file, requestId);
  } catch (error) {
    if (requestId === latestRequest) setStatus("compress-status", `Error: ${error.message}.`, true);
  }
}

// Browsers cannot play the default video format. An image is a PNG.
const decompress = (file) => request("v1/decompress", { method: "POST", body: file, headers: { Accept: "video/mp4, */*" } });

async function openBsqFile(file, requestId) {
  setStatus("compress-status", "Decompressing …");
  const response = await decompress(file);
  const decoded = await response.blob();
  if (requestId !== latestRequest) return;
  await showResult(decoded, null, file, response.headers);
  setStatus("compress-status", `${file.name ?? "The file"}, written with the model ${response.headers.get("X-Model")}.`);
}

async function openOriginal(file, requestId) {
  setStatus("compress-status", file.type.startsWith("video/") ? "Compressing … videos take longer than images." : "Compressing …");
  const { blob, isScaled, isVisible, size } = await prepareUpload(file);
  const selected = byId("codec").value;
  const response = await request(`v1/compress${selected && `?model=${encodeURIComponent(selected)}`}`, { method: "POST", body: blob });
  const compressed = await response.blob();
  const isVideo = response.headers.has("X-Frames");
  if (isVideo && requestId === latestRequest) setStatus("compress-status", "Decompressing …");
  const decoded = await (await decompress(compressed)).blob();
  if (requestId !== latestRequest) return;
  await showResult(decoded, isVideo ? file : isVisible ? blob : null, compressed, response.headers);
  const model = response.headers.get("X-Model");
  if (isVideo) {
    const ratio = compressed.size / file.size;
    const relativeSize = ratio < 0.995 ? `${(100 * ratio).toFixed(1)} %` : `${ratio.toFixed(2)} times the size`;
    setStatus("compress-status", `Done with the model ${model}: ${relativeSize} of the original file.`);
    return;
  }
  setStatus("compress-status", `${isScaled ? `Downscaled to ${size} pixels. ` : ""}Measuring …`);
  const report = await (await request(`v1/measure?model=${encodeURIComponent(model)}`, { method: "POST", body: blob })).json();
  if (requestId !== latestRequest) return;
  showMetrics([...rateEntries(compressed, response.headers), ["PSNR", `${report.psnr.toFixed(2)} dB`], ...(report.lpips === null ? [] : [["LPIPS", report.lpips.toFixed(3)]])]);
  compareSizes(report);
  setStatus("compress-status", isScaled ? `Downscaled to ${size} pixels.` : "Done.");
}

const rateEntries = (file, headers) => [
  ["bits", (8 * file.size).toLocaleString("en")],
  ["bits per pixel", Number(headers.get("X-Bits-Per-Pixel")).toFixed(3)],
  ["bytes", formatBytes(file.size)],
  ...(headers.has("X-Frames") ? [["frames", headers.get("X-Frames")]] : []),
];

async function showResult(decoded, original, file, headers) {
  const isVideo = headers.has("X-Frames");
  byId("videos").hidden = !isVideo;
  byId("image-comparison").hidden = isVideo;
  if (isVideo) showVideos(decoded, original);
  else await showImages(decoded, original);
  setObjectUrl("download", "href", new Blob([file], { type: "application/x-bsq" }));
  byId("download").download = isVideo ? "clip.bsq" : "image.bsq";
  showMetrics(rateEntries(file, headers));
  byId("result").hidden = false;
}

async function showImages(decoded, original) {
  setObjectUrl("decoded", "src", decoded);
  byId("compare").classList.toggle("alone", original === null);
  byId("slider-help").hidden = original === null;
  if (original) setObjectUrl("original", "src", original);
  await byId("decoded").decode();
  // Small images are displayed at twice their size, never wider than the page.
  const width = byId("decoded").naturalWidth;
  byId("compare").style.width = `${width < 420 ? 2 * width : width}px`;
  moveSlider(50);
}

function showVideos(decoded, original) {
  byId("original-video-figure").hidden = original === null;
  if (original) setObjectUrl("original-video", "src", original);
  setObjectUrl("decoded-video", "src", decoded);
}

// A video that the browser cannot play is hidden.
byId("original-video").addEventListener("error", () => { byId("original-video-figure").hidden = true; });
for (const [one, other] of [["original-video", "decoded-video"], ["decoded-video", "original-video"]]) {
  // Both videos play, pause and seek together, so that they display the same moment.
  byId(one).addEventListener("play", () => byId(other).play().catch(() => {}));
  byId(one).addEventListener("pause", () => byId(other).pause());
  byId(one).addEventListener("seeked", () => {
    if (Math.abs(byId(one).currentTime - byId(other).currentTime) > 0.1) byId(other).currentTime = byId(one).currentTime;
  });
}

function compareSizes({ equal, bytes: bsqBytes }) {
  const makeRow = (cells) => {
    const row = document.createElement("tr");
    row.append(...cells.map((text, index) => {
      const cell = document.createElement(index ? "td" : "th");
      if (!index) cell.scope = "row";
      cell.textContent = text;
      return cell;
    }));
    return row;
  };
  const rows = [makeRow(["this .bsq file", formatBytes(bsqBytes), ""])];
  for (const [metric, name] of [["lpips", "LPIPS"], ["psnr", "PSNR"]]) {
    for (const [codec, match] of Object.entries(equal[metric] ?? {})) {
      const label = `${codec} of equal ${name}`;
      if (match === null) rows.push(makeRow([label, "–", "worse at its highest quality"]));
      else {
        const ratio = `${(match.bytes / bsqBytes).toFixed(2)} ×`;
        rows.push(makeRow([label, formatBytes(match.bytes), match.better ? `${ratio}, better at its lowest quality` : ratio]));
      }
    }
  }
  byId("size-rows").replaceChildren(...rows);
  byId("sizes").hidden = false;
}

function moveSlider(percent) {
  byId("slider").value = percent;
  byId("slider").setAttribute("aria-valuetext", `${percent} percent original`);
  byId("compare").style.setProperty("--at", `${percent}%`);
}

byId("slider").addEventListener("input", (event) => moveSlider(event.target.value));
byId("file").addEventListener("change", (event) => event.target.files[0] && openUpload(event.target.files[0]));
for (const name of ["dragover", "dragleave", "drop"]) {
  // Anywhere on the page: otherwise a file dropped outside the field would replace the page.
  window.addEventListener(name, (event) => {
    event.preventDefault();
    byId("drop").classList.toggle("over", name === "dragover");
    if (name === "drop" && event.dataTransfer.files[0] && !byId("compress").hidden) openUpload(event.dataTransfer.files[0]);
  });
}

// Generation ---------------------------------------------------------------------------------------------------------

let generationAbort = null;
let selectedGenerator = "";

function showClasses() {
  selectedGenerator = byId("generator").value;
  const model = models.find(({ name }) => name === selectedGenerator);
  const options = Array.from({ length: model.num_classes }, (_, label) => new Option(`class ${label}`, label));
  byId("class").replaceChildren(...options, new Option("any class", model.num_classes));
  byId("steps").value = model.steps;
  byId("guidance").value = model.guidance_scale;
}

async function generate() {
  generationAbort = new AbortController();
  byId("start").textContent = "Stop";
  byId("progress").hidden = false;
  byId("progress").removeAttribute("value");
  setStatus("generate-status", "Generating …");
  const number = (id) => (byId(id).value === "" ? undefined : Number(byId(id).value));
  const body = { model: byId("generator").value, class: number("class"), steps: number("steps"), guidance_scale: number("guidance"), seed: number("seed") };
  try {
    const response = await request("v1/generate", { method: "POST", body: JSON.stringify(body), signal: generationAbort.signal });
    let last = null;
    for await (const line of ndjsonLines(response.body)) {
      if (line.error) throw new ApiError(0, line.error);
      byId("generated").src = line.image;
      byId("generated").alt = `Image of ${byId("class").selectedOptions[0].text}, step ${line.step} of ${line.steps}`;
      byId("generated").hidden = false;
      byId("progress").max = line.steps;
      byId("progress").value = line.step;
      last = line;
    }
    if (!last || last.step < last.steps) throw new ApiError(0, "the response ended early");
    setStatus("generate-status", `Generated in ${last.steps} steps with seed ${last.seed}.`);
  } catch (error) {
    if (error.name === "AbortError") setStatus("generate-status", "Stopped.");
    else setStatus("generate-status", `Error: ${error.message}.`, true);
    byId("progress").hidden = true;
  }
  generationAbort = null;
  byId("start").textContent = "Generate";
}

async function* ndjsonLines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffered = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (buffered + value).split("\n");
    buffered = parts.pop();
    for (const part of parts) yield JSON.parse(part);
  }
}

byId("generator").addEventListener("change", showClasses);
byId("generate-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (generationAbort) generationAbort.abort();
  else generate();
});

loadModels();
