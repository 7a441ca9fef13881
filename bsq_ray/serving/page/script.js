// The page: asks the service's own HTTP interface and shows what it answers.

const at = (id) => document.getElementById(id);
// Larger photographs are shrunk here, so that measuring them takes seconds.
const LONGEST_SIDE = 640;

class Refusal extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

async function ask(path, options = {}) {
  const token = sessionStorage.getItem("token");
  const headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  const answer = await fetch(path, { ...options, headers }).catch((error) => {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, "the service does not answer");
  });
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({}));
  throw new Refusal(answer.status, told.error ?? `the service answers ${answer.status}`);
}

function say(id, text, fault = false) {
  at(id).textContent = text;
  at(id).classList.toggle("fault", fault);
}

// Models -------------------------------------------------------------------------------------------------------------

let models = [];

async function begin() {
  try {
    ({ models } = await (await ask("/v1/models")).json());
  } catch (refusal) {
    at("access").hidden = refusal.status !== 401;
    if (refusal.status === 401) at("token").focus();
    else setTimeout(begin, 2000);
    return;
  }
  at("access").hidden = true;
  offer("compress", "codec", new Option("the first that suits the file", ""));
  offer("generate", "drawer");
  at("codec-row").hidden = at("codec").options.length < 3;
  // What has been typed stays while other models are still being loaded.
  if (at("drawer").value !== shownDrawer) showClasses();
  if (models.some((model) => !model.ready)) setTimeout(begin, 2000);
}

function offer(request, select, ...others) {
  const able = models.filter((model) => model.ready && model.offers.includes(request));
  const chosen = at(select).value;
  at(select).replaceChildren(...others, ...able.map((model) => new Option(model.name, model.name)));
  if (able.some((model) => model.name === chosen)) at(select).value = chosen;
  at(request).hidden = able.length === 0;
}

at("access").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", at("token").value.trim());
  begin();
});

// Compressing --------------------------------------------------------------------------------------------------------

const bytes = (count) => (count < 10000 ? `${count}` : `${Math.round(count / 100) / 10} k`);
const urls = new Map();
let turn = 0;

function show(id, attribute, blob) {
  if (urls.has(id)) URL.revokeObjectURL(urls.get(id));
  urls.set(id, URL.createObjectURL(blob));
  at(id)[attribute] = urls.get(id);
}

function facts(entries) {
  at("facts").replaceChildren(...entries.map(([name, value]) => {
    const entry = document.createElement("div");
    for (const [kind, text] of [["dt", name], ["dd", value]]) {
      entry.append(Object.assign(document.createElement(kind), { textContent: text }));
    }
    return entry;
  }));
}

async function prepared(file) {
  const picture = await createImageBitmap(file).catch(() => null);
  // The service looks at the file itself; a type that the browser guessed from the name would only mislead.
  if (!picture) return { blob: new Blob([file]), scaled: false, visible: false };
  const factor = LONGEST_SIDE / Math.max(picture.width, picture.height);
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(picture.width * Math.min(1, factor)));
  canvas.height = Math.max(1, Math.round(picture.height * Math.min(1, factor)));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  // What is transparent becomes white, as in the service.
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  const blob = await new Promise((done) => canvas.toBlob(done, "image/png"));
  return { blob, scaled: factor < 1, visible: true, size: `${canvas.width} × ${canvas.height}` };
}

async function open(file) {
  const mine = ++turn;
  at("result").hidden = true;
  at("sizes").hidden = true;
  for (const id of ["source", "clip"]) at(id).pause();
  try {
    if (new TextDecoder().decode(await file.slice(0, 4).arrayBuffer()) === "BSQ1") await openFile(file, mine);
    else await openOriginal(file, mine);
  } catch (refusal) {
    if (mine === turn) say("compress-status", `That did not work: ${refusal.message}.`, true);
  }
}

// A clip as the browser plays it; an image is a PNG.
const decompressed = (file) => ask("/v1/decompress", { method: "POST", body: file, headers: { Accept: "video/mp4, */*" } });

async function openFile(file, mine) {
  say("compress-status", "Decompressing …");
  const answer = await decompressed(file);
  const shown = await answer.blob();
  if (mine !== turn) return;
  await present(shown, null, file, answer.headers);
  say("compress-status", `${file.name ?? "The file"}, written with the model ${answer.headers.get("X-Model")}.`);
}

async function openOriginal(file, mine) {
  say("compress-status", file.type.startsWith("video/") ? "Compressing … a video takes its time." : "Compressing …");
  const { blob, scaled, visible, size } = await prepared(file);
  const chosen = at("codec").value;
  const answer = await ask(`/v1/compress${chosen && `?model=${encodeURIComponent(chosen)}`}`, { method: "POST", body: blob });
  const compressed = await answer.blob();
  const isClip = answer.headers.has("X-Frames");
  if (isClip && mine === turn) say("compress-status", "Decompressing …");
  const shown = await (await decompressed(compressed)).blob();
  if (mine !== turn) return;
  await present(shown, isClip ? file : visible ? blob : null, compressed, answer.headers);
  if (isClip) {
    const share = compressed.size / file.size;
    say("compress-status", `Done with the model ${answer.headers.get("X-Model")}: ${share < 0.995 ? `${(100 * share).toFixed(1)} %` : `${share.toFixed(2)} times the size`} of the original file.`);
    return;
  }
  say("compress-status", `${scaled ? `Shrunk to ${size} pixels first. ` : ""}Measuring …`);
  const measuring = `/v1/measure?model=${encodeURIComponent(answer.headers.get("X-Model"))}`;
  const figures = await (await ask(measuring, { method: "POST", body: blob })).json();
  if (mine !== turn) return;
  facts([...rates(compressed, answer.headers), ["PSNR", `${figures.psnr.toFixed(2)} dB`], ["LPIPS", figures.lpips.toFixed(3)]]);
  compareSizes(figures);
  say("compress-status", scaled ? `Shrunk to ${size} pixels first.` : "Done.");
}

const rates = (file, headers) => [
  ["bits", (8 * file.size).toLocaleString("en")],
  ["bits per pixel", Number(headers.get("X-Bits-Per-Pixel")).toFixed(3)],
  ["bytes", bytes(file.size)],
  ...(headers.has("X-Frames") ? [["frames", headers.get("X-Frames")]] : []),
];

async function present(shown, original, file, headers) {
  const isClip = headers.has("X-Frames");
  at("clips").hidden = !isClip;
  at("picture").hidden = isClip;
  if (isClip) presentClip(shown, original);
  else await presentPicture(shown, original);
  show("download", "href", new Blob([file], { type: "application/x-bsq" }));
  at("download").download = isClip ? "clip.bsq" : "image.bsq";
  facts(rates(file, headers));
  at("result").hidden = false;
}

async function presentPicture(shown, original) {
  show("shown", "src", shown);
  at("compare").classList.toggle("alone", original === null);
  at("slider-help").hidden = original === null;
  if (original) show("original", "src", original);
  await at("shown").decode();
  // Small pictures are shown at twice their size, never wider than the page.
  const width = at("shown").naturalWidth;
  at("compare").style.width = `${width < 420 ? 2 * width : width}px`;
  slide(50);
}

function presentClip(shown, original) {
  // Whatever the browser cannot play is not shown.
  at("source-part").hidden = original === null;
  if (original) show("source", "src", original);
  show("clip", "src", shown);
}

at("source").addEventListener("error", () => { at("source-part").hidden = true; });
for (const [one, other] of [["source", "clip"], ["clip", "source"]]) {
  // What is done to one video happens to the other one, so that they show the same moment.
  at(one).addEventListener("play", () => at(other).play().catch(() => {}));
  at(one).addEventListener("pause", () => at(other).pause());
  at(one).addEventListener("seeked", () => {
    if (Math.abs(at(one).currentTime - at(other).currentTime) > 0.1) at(other).currentTime = at(one).currentTime;
  });
}

function compareSizes({ equal, bytes: ours }) {
  const row = (cells) => {
    const line = document.createElement("tr");
    line.append(...cells.map((text, place) => {
      const cell = document.createElement(place ? "td" : "th");
      if (!place) cell.scope = "row";
      cell.textContent = text;
      return cell;
    }));
    return line;
  };
  const lines = [row(["this .bsq file", bytes(ours), ""])];
  for (const [metric, name] of [["lpips", "LPIPS"], ["psnr", "PSNR"]]) {
    for (const [codec, found] of Object.entries(equal[metric])) {
      const label = `${codec} of equal ${name}`;
      if (found === null) lines.push(row([label, "–", "no quality is as good"]));
      else {
        const ratio = `${(found.bytes / ours).toFixed(2)} ×`;
        lines.push(row([label, bytes(found.bytes), found.better ? `${ratio}, its lowest quality is still better` : ratio]));
      }
    }
  }
  at("rows").replaceChildren(...lines);
  at("sizes").hidden = false;
}

function slide(value) {
  at("slider").value = value;
  at("slider").setAttribute("aria-valuetext", `${value} percent original`);
  at("compare").style.setProperty("--at", `${value}%`);
}

at("slider").addEventListener("input", (event) => slide(event.target.value));
at("file").addEventListener("change", (event) => event.target.files[0] && open(event.target.files[0]));
for (const name of ["dragover", "dragleave", "drop"]) {
  // Anywhere on the page: a file dropped beside the field must not replace the page.
  window.addEventListener(name, (event) => {
    event.preventDefault();
    at("drop").classList.toggle("over", name === "dragover");
    if (name === "drop" && event.dataTransfer.files[0] && !at("compress").hidden) open(event.dataTransfer.files[0]);
  });
}

// Drawing ------------------------------------------------------------------------------------------------------------

let drawing = null;
let shownDrawer = "";

function showClasses() {
  shownDrawer = at("drawer").value;
  const model = models.find(({ name }) => name === at("drawer").value);
  const options = Array.from({ length: model.classes }, (_, number) => new Option(`class ${number}`, number));
  at("class").replaceChildren(...options, new Option("any class", model.classes));
  at("steps").value = model.steps;
  at("guidance").value = model.guidance;
}

async function draw() {
  drawing = new AbortController();
  at("start").textContent = "Stop";
  at("progress").hidden = false;
  at("progress").removeAttribute("value");
  say("draw-status", "Drawing …");
  const number = (id) => (at(id).value === "" ? undefined : Number(at(id).value));
  const wanted = { model: at("drawer").value, class: number("class"), steps: number("steps"), guidance: number("guidance"), seed: number("seed") };
  try {
    const answer = await ask("/v1/generate", { method: "POST", body: JSON.stringify(wanted), signal: drawing.signal });
    let last = null;
    for await (const line of lines(answer.body)) {
      if (line.error) throw new Refusal(0, line.error);
      at("drawn").src = line.image;
      at("drawn").alt = `A picture of ${at("class").selectedOptions[0].text}, ${line.step} of ${line.steps} steps`;
      at("drawn").hidden = false;
      at("progress").max = line.steps;
      at("progress").value = line.step;
      last = line;
    }
    if (!last || last.step < last.steps) throw new Refusal(0, "the answer ended early");
    say("draw-status", `Drawn in ${last.steps} steps with the seed ${last.seed}.`);
  } catch (refusal) {
    if (refusal.name === "AbortError") say("draw-status", "Stopped.");
    else say("draw-status", `That did not work: ${refusal.message}.`, true);
    at("progress").hidden = true;
  }
  drawing = null;
  at("start").textContent = "Draw";
}

async function* lines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part);
  }
}

at("drawer").addEventListener("change", showClasses);
at("draw").addEventListener("submit", (event) => {
  event.preventDefault();
  if (drawing) drawing.abort();
  else draw();
});

begin();
