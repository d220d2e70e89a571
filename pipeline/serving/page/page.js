// The page of a service: draws by one request an image, which the service puts into batches, so that images come
// in as they are made.

const AT_ONCE = 6; // requests
const ANY_SEED = 2 ** 32;
const at = (id) => document.getElementById(id);
const api = (path) => new URL(path, document.baseURI).href;

let model = null;
let drawing = null; // AbortController of what is drawn
let shown = null; // index in `images` of the image in the viewer
let images = []; // {prompt, seed, steps, size, blob, url}
let before = null; // object URL of the picture that was upscaled
const noted = new Set(); // notes that were shown

// --- The service.

let token = new URLSearchParams(location.hash.slice(1)).get("token") ?? sessionStorage.getItem("token");
if (location.hash.includes("token=")) {
  sessionStorage.setItem("token", token);
  history.replaceState(null, "", location.pathname);
}

class Failure extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function call(path, options = {}) {
  return (await answerOf(path, options)).json().catch(() => ({}));
}

async function answerOf(path, options = {}) {
  const headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  for (;;) {
    const answer = await fetch(api(path), { ...options, headers });
    if (answer.ok) return answer;
    if (answer.status !== 429) {
      const body = await answer.json().catch(() => ({}));
      throw new Failure(body.error?.message ?? `the service answers ${answer.status}`, answer.status);
    }
    await pause(1000 * Number(answer.headers.get("Retry-After") ?? 1), options.signal);
  }
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}

function draw({ prompt, seed, steps, size }, signal) {
  const body = JSON.stringify({ prompt, seed, steps, size, response_format: "b64_json" });
  return call("v1/images/generations", { method: "POST", headers: { "Content-Type": "application/json" }, body, signal });
}

function toBlob(text) {
  return new Blob([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], { type: "image/png" });
}

function complain(place, error) {
  const box = at(place);
  box.hidden = !error;
  box.textContent = error ? (error instanceof TypeError ? "The service does not answer." : error.message) : "";
}

// --- The model's card.

const ROWS = {
  id: "name", version: "version", digest: "sha256", kind: "kind", resolution: "px", parameters: "parameters",
  passes: "passes", sizes: "sizes", text_encoder: "text encoder",
};

function list(place, rows) {
  at(place).replaceChildren(...rows.flatMap(([name, value]) => {
    const term = document.createElement("dt");
    const text = document.createElement("dd");
    term.textContent = name;
    text.textContent = value;
    return [term, text];
  }));
}

function options(place, values) {
  const chosen = at(place).value;
  at(place).replaceChildren(...values.map((value) => new Option(value, value)));
  if (values.map(String).includes(chosen)) at(place).value = chosen;
}

function known(value) {
  return value !== null && value !== undefined && !(Array.isArray(value) && !value.length);
}

function showModel(card) {
  model = card;
  const version = card.version ? ` version ${card.version}` : "";
  at("served").textContent = `${card.id}${version} · ${card.resolution} px · ${card.digest.slice(0, 12)}`;
  at("steps-label").textContent = card.passes.length ? "Passes" : "Steps";
  const steps = card.passes.length ? card.passes : [4, 8, 12, 16, 24, 32];
  options("steps", [...new Set([...steps, card.default_steps])].sort((a, b) => a - b));
  if (!at("steps").dataset.chosen) at("steps").value = card.default_steps;
  options("size", card.sizes);
  list("card", Object.entries(ROWS).filter(([key]) => known(card[key])).map(([key, name]) => {
    const value = card[key];
    return [name, Array.isArray(value) ? value.join(", ") : typeof value === "number" ? value.toLocaleString("en") : value];
  }));
  const lineage = Object.entries(card.lineage);
  list("lineage", lineage.length ? lineage.map(([name, value]) => [name.replaceAll("_", " "), value]) : [["", "not recorded"]]);
  at("upscale").querySelector(".primary").disabled = !card.upscales;
  if (!card.upscales) at("upscale-status").textContent = "This model does not upscale.";
}

async function showFilms({ digest, films }) {
  if (at("films").dataset.digest === digest) return;
  at("films").dataset.digest = digest;
  const blobs = await Promise.all(films.map(async (stage) => (await answerOf(`v1/films/${stage}.png`)).blob()));
  at("films").querySelectorAll("a").forEach((link) => URL.revokeObjectURL(link.href));
  at("films").replaceChildren(...blobs.map((blob, i) => {
    const link = document.createElement("a");
    const picture = new Image();
    link.href = picture.src = URL.createObjectURL(blob);
    link.target = "_blank";
    picture.alt = `Film strip of the stage ${films[i]}`;
    link.append(picture);
    return link;
  }));
  at("training").hidden = !films.length;
}

async function loadModel() {
  try {
    const [card] = (await call("v1/models")).data;
    showModel(card);
    at("access").hidden = true;
    // They fail where the model has changed meanwhile, and are asked for again with its card.
    await showFilms(card).catch(() => delete at("films").dataset.digest);
  } catch (error) {
    if (error.status === 401) {
      at("access").hidden = false;
      at("served").textContent = "";
      at("token").focus();
    } else {
      complain("error", error);
    }
  }
}

// --- Generating.

function asked() {
  const seed = at("seed").value === "" ? Math.floor(Math.random() * ANY_SEED) : Number(at("seed").value);
  return { prompt: at("prompt").value, seed, steps: Number(at("steps").value), size: at("size").value };
}

function place(wanted) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  const text = document.createElement("p");
  item.className = "waiting";
  button.type = "button";
  button.disabled = true;
  button.setAttribute("aria-label", `Waiting for seed ${wanted.seed}`);
  text.textContent = `seed ${wanted.seed}`;
  item.append(button, text);
  return item;
}

function fill(item, made) {
  const picture = new Image();
  const button = item.querySelector("button");
  picture.src = made.url;
  picture.alt = made.prompt || "without a caption";
  item.className = "";
  button.disabled = false;
  button.setAttribute("aria-label", `${picture.alt}, seed ${made.seed}: look closer`);
  button.append(picture);
  const index = images.push(made) - 1;
  button.addEventListener("click", () => look(index));
}

async function generate(event) {
  event.preventDefault();
  if (!model) await loadModel();
  if (!model) return;
  drawing?.abort();
  drawing = new AbortController();
  const { signal } = drawing;
  const first = asked();
  const count = at("count").valueAsNumber;
  const wanted = Array.from({ length: count }, (_, i) => ({ ...first, seed: first.seed + i }));
  const items = wanted.map(place);
  images.forEach((image) => URL.revokeObjectURL(image.url));
  images = [];
  noted.clear();
  complain("error", null);
  at("gallery").replaceChildren(...items);
  at("stop").hidden = false;
  at("status").textContent = `0 of ${count}`;
  const start = performance.now();
  let next = 0;
  const work = async () => {
    while (next < count) {
      const i = next++;
      const answer = await draw(wanted[i], signal);
      const blob = toBlob(answer.data[0].b64_json);
      fill(items[i], { ...wanted[i], size: answer.size, blob, url: URL.createObjectURL(blob) });
      answer.notes.forEach((note) => noted.add(note));
      const seconds = ((performance.now() - start) / 1000).toFixed(1);
      at("status").textContent = [`${images.length} of ${count} in ${seconds} s`, ...noted].join(" · ");
    }
  };
  try {
    await Promise.all(Array.from({ length: Math.min(AT_ONCE, count) }, work));
  } catch (error) {
    const stopped = signal.aborted;
    if (drawing?.signal !== signal) return; // another one has begun
    drawing.abort();
    items.filter((item) => item.className === "waiting").forEach((item) => item.remove());
    if (!stopped) {
      at("status").textContent = "";
      complain("error", error);
    }
    if (error.status === 401) loadModel();
  }
  if (drawing?.signal === signal) at("stop").hidden = true;
}

// --- One image.

function look(index) {
  const image = images[index];
  shown = index;
  at("large").src = image.url;
  at("large").alt = image.prompt || "without a caption";
  const steps = model.passes.length ? (image.steps === 1 ? "1 pass" : `${image.steps} passes`) : `${image.steps} steps`;
  at("caption").textContent = `${image.prompt || "without a caption"} · seed ${image.seed} · ${steps} · ${image.size}`;
  at("download").href = image.url;
  at("download").download = `seed-${image.seed}.png`;
  at("enlarge").hidden = !model.upscales;
  if (!history.state?.viewer) history.pushState({ viewer: true }, "");
  if (!at("viewer").open) at("viewer").showModal();
}

// The browser's way back closes an image, and does not leave the page.
addEventListener("popstate", () => at("viewer").close());

at("viewer").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (step) look((shown + step + images.length) % images.length);
});
at("viewer").addEventListener("click", (event) => event.target === at("viewer") && at("viewer").close());
at("again").addEventListener("click", () => {
  at("seed").value = images[shown].seed;
  at("viewer").close();
  at("seed").focus();
});
at("enlarge").addEventListener("click", () => {
  const { blob, prompt, seed } = images[shown];
  const files = new DataTransfer();
  files.items.add(new File([blob], `seed-${seed}.png`, { type: "image/png" }));
  at("file").files = files.files;
  at("shows").value = prompt;
  at("viewer").close();
  at("upscaling").scrollIntoView();
  at("upscale").requestSubmit();
});

// --- Upscaling.

async function upscale(event) {
  event.preventDefault();
  const [file] = at("file").files;
  const body = new FormData();
  body.set("image", file);
  body.set("factor", at("factor").value);
  body.set("prompt", at("shows").value);
  body.set("seed", "0");
  body.set("response_format", "b64_json");
  complain("upscale-error", null);
  at("upscale-status").textContent = "Upscaling …";
  try {
    const answer = await call("v1/images/edits", { method: "POST", body });
    if (before) URL.revokeObjectURL(before);
    URL.revokeObjectURL(at("after").src);
    before = URL.createObjectURL(file);
    at("before").src = before;
    at("after").src = URL.createObjectURL(toBlob(answer.data[0].b64_json));
    at("save").href = at("after").src;
    at("comparison").hidden = false;
    at("upscale-status").textContent = [answer.size, ...answer.notes].join(" · ");
    divide();
  } catch (error) {
    at("upscale-status").textContent = "";
    complain("upscale-error", error);
  }
}

function divide() {
  at("before").style.clipPath = `inset(0 ${100 - at("divider").value}% 0 0)`;
}

// --- As commands.

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
const auth = () => (token ? ' -H "Authorization: Bearer $CRESCENDO_TOKEN"' : "");

function generateCommand() {
  const { prompt, seed, steps, size } = asked();
  const body = JSON.stringify({ prompt, n: Math.min(at("count").valueAsNumber || 1, 10), seed, steps, size });
  return `curl ${api("v1/images/generations")}${auth()} -H 'Content-Type: application/json' -d ${quoted(body)}`;
}

function upscaleCommand() {
  const name = at("file").files[0]?.name ?? "picture.png";
  const fields = [`image=@${name}`, `factor=${at("factor").value}`, `prompt=${at("shows").value}`, "seed=0"];
  return `curl ${api("v1/images/edits")}${auth()} ${fields.map((field) => `-F ${quoted(field)}`).join(" ")}`;
}

async function copy(text, place) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text).catch(() => {});
  } else {
    const area = document.body.appendChild(document.createElement("textarea")); // where the page came over plain HTTP
    area.value = text;
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  at(place).textContent = "Copied.";
}

// --- Beginning.

at("generate").addEventListener("submit", generate);
at("upscale").addEventListener("submit", upscale);
at("divider").addEventListener("input", divide);
at("stop").addEventListener("click", () => drawing?.abort());
at("forget").addEventListener("click", () => (at("seed").value = ""));
at("steps").addEventListener("change", () => (at("steps").dataset.chosen = "yes"));
at("curl").addEventListener("click", () => copy(generateCommand(), "status"));
at("upscale-curl").addEventListener("click", () => copy(upscaleCommand(), "upscale-status"));
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("generate").requestSubmit();
  }
});
at("access").addEventListener("submit", (event) => {
  event.preventDefault();
  token = at("token").value.trim();
  sessionStorage.setItem("token", token);
  loadModel();
});
at("base").textContent = api("v1");
await loadModel();
setInterval(() => document.hidden || drawing?.signal.aborted === false && !at("stop").hidden || loadModel(), 30_000);
