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
  showRates();
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

// The model that compresses a file: the selected one, or the one that the service chooses.
function codecFor(isVideo) {
  const capable = models.filter((model) => model.ready && model.capabilities.includes("compress"));
  const isChosen = byId("codec").value ? ({ name }) => name === byId("codec").value : ({ frames }) => frames > 1 === isVideo;
  return capable.find(isChosen) ?? capable[0];
}

// Only models with nested bits have rates to select. The selected rate stays while other models load.
function showRates() {
  const { name, selectable_bits: rates } = codecFor(false) ?? { name: "", selectable_bits: [] };
  byId("bits-row").hidden = rates.length < 2;
  if (rates.length < 2 || byId("bits").dataset.model === name) return;
  Object.assign(byId("bits"), { min: rates[0], max: rates.at(-1), step: rates[1] - rates[0], value: rates.at(-1) });
  byId("bits").dataset.model = name;
  showSelectedBits();
}

function showSelectedBits() {
  byId("bits-value").textContent = `${byId("bits").value} of ${byId("bits").max}`;
  byId("bits").setAttribute("aria-valuetext", byId("bits-value").textContent);
}

// The model and the rate that are selected for a file, as parameters of a request.
function selectedRate(file) {
  const model = codecFor(file.type.startsWith("video/"))?.name;
  const { dataset, value, max, parentElement: row } = byId("bits");
  if (!row.hidden && dataset.model === model && value !== max) return { model, bits: value };
  return byId("codec").value ? { model: byId("codec").value } : {};
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
// Compressed again when another rate is selected.
let latestOriginal = null;

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
  latestOriginal = null;
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
const decompress = (file, query) => request(`v1/decompress${query}`, { method: "POST", body: file, headers: { Accept: "video/mp4, */*" } });

// Both values of a header such as "12/24".
const readPair = (headers, name) => headers.get(name).split("/").map(Number);

// Decodes the first plane of nested bits, then 2, 4, 8 … until all of them; other files are one plane. Each response
// decodes from the start of the file, so doubling bounds the time of all responses to about twice that of the last one.
async function* decodePlanes(file) {
  for (let planes = 1; ; planes *= 2) {
    const response = await decompress(file, planes === Infinity ? "" : `?planes=${planes}`);
    yield { decoded: await response.blob(), headers: response.headers };
    const [numBytes, availableBytes] = readPair(response.headers, "X-Bytes");
    if (numBytes === availableBytes) return;
    // Each response with a clip is a whole video, so all planes follow the first one.
    if (response.headers.has("X-Frames")) planes = Infinity;
  }
}

// Displays a file, sharper with each plane. Returns the headers of the last response, or null if another file was opened.
async function showPlanes(file, original, requestId) {
  let lastHeaders = null;
  if (requestId === latestRequest) setStatus("compress-status", "Decompressing …");
  for await (const { decoded, headers } of decodePlanes(file)) {
    if (requestId !== latestRequest) return null;
    if (lastHeaders) await updateDecoded(decoded, headers);
    else await showResult(decoded, original, file, headers);
    lastHeaders = headers;
  }
  return requestId === latestRequest ? lastHeaders : null;
}

async function openBsqFile(file, requestId) {
  const headers = await showPlanes(file, null, requestId);
  if (headers) setStatus("compress-status", `${file.name ?? "The file"}, written with the model ${headers.get("X-Model")}.`);
}

async function openOriginal(file, requestId) {
  setStatus("compress-status", file.type.startsWith("video/") ? "Compressing … videos take longer than images." : "Compressing …");
  const { blob, isScaled, isVisible, size } = await prepareUpload(file);
  latestOriginal = file;
  const rate = selectedRate(file);
  const response = await request(`v1/compress?${new URLSearchParams(rate)}`, { method: "POST", body: blob });
  const compressed = await response.blob();
  const isVideo = response.headers.has("X-Frames");
  const headers = await showPlanes(compressed, isVideo ? file : isVisible ? blob : null, requestId);
  if (!headers) return;
  const model = headers.get("X-Model");
  if (isVideo) {
    const ratio = compressed.size / file.size;
    const relativeSize = ratio < 0.995 ? `${(100 * ratio).toFixed(1)} %` : `${ratio.toFixed(2)} times the size`;
    setStatus("compress-status", `Done with the model ${model}: ${relativeSize} of the original file.`);
    return;
  }
  setStatus("compress-status", `${isScaled ? `Downscaled to ${size} pixels. ` : ""}Measuring …`);
  const report = await (await request(`v1/measure?${new URLSearchParams({ ...rate, model })}`, { method: "POST", body: blob })).json();
  if (requestId !== latestRequest) return;
  showMetrics([...rateEntries(headers), ["PSNR", `${report.psnr.toFixed(2)} dB`], ...(report.lpips === null ? [] : [["LPIPS", report.lpips.toFixed(3)]])]);
  compareSizes(report);
  setStatus("compress-status", isScaled ? `Downscaled to ${size} pixels.` : "Done.");
}

const rateEntries = (headers) => [
  ["bits", (8 * readPair(headers, "X-Bytes")[0]).toLocaleString("en")],
  ["bits per pixel", Number(headers.get("X-Bits-Per-Pixel")).toFixed(3)],
  ["bytes", formatBytes(readPair(headers, "X-Bytes")[0])],
  ...(headers.has("X-Frames") ? [["frames", headers.get("X-Frames")]] : []),
];

async function showResult(decoded, original, file, headers) {
  const isVideo = headers.has("X-Frames");
  byId("videos").hidden = !isVideo;
  byId("image-comparison").hidden = isVideo;
  showOriginal(original, isVideo);
  await updateDecoded(decoded, headers);
  if (!isVideo) fitComparison();
  setObjectUrl("download", "href", new Blob([file], { type: "application/x-bsq" }));
  byId("download").download = isVideo ? "clip.bsq" : "image.bsq";
  byId("result").hidden = false;
}

async function updateDecoded(decoded, headers) {
  const isVideo = headers.has("X-Frames");
  setObjectUrl(isVideo ? "decoded-video" : "decoded", "src", decoded);
  if (!isVideo) await byId("decoded").decode();
  showMetrics(rateEntries(headers));
  const [numBits, storedBits] = readPair(headers, "X-Bits-Per-Token");
  const [numBytes, availableBytes] = readPair(headers, "X-Bytes").map((count) => count.toLocaleString("en"));
  const bits = `${numBits} of ${storedBits} bits per token`;
  if (numBytes !== availableBytes) byId("planes").textContent = `${bits}, from the first ${numBytes} of ${availableBytes} bytes`;
  else byId("planes").textContent = `${bits}, from ${numBytes} bytes${numBits < storedBits ? ", because the file is cut" : ""}`;
}

function showOriginal(original, isVideo) {
  byId("original-video-figure").hidden = original === null;
  byId("compare").classList.toggle("alone", original === null);
  byId("slider-help").hidden = original === null;
  if (original) setObjectUrl(isVideo ? "original-video" : "original", "src", original);
}

function fitComparison() {
  // Small images are displayed at twice their size, never wider than the page.
  const width = byId("decoded").naturalWidth;
  byId("compare").style.width = `${width < 420 ? 2 * width : width}px`;
  moveSlider(50);
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

byId("codec").addEventListener("change", showRates);
byId("bits").addEventListener("input", showSelectedBits);
byId("bits").addEventListener("change", () => latestOriginal && openUpload(latestOriginal));
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
