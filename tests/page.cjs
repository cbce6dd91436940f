// node page.cjs URL WORKFLOW.json: drops the file on the canvas of ComfyUI's page, as a person does, queues it with the
// page's own code, and prints what the page made of it as JSON. Serves the page of 2024 and the newer ones. With
// SAYS set to the type of a node it waits for the run, and prints what that node says on itself, and the prompt after
// that; SCREENSHOT names a PNG to write at the end.
const { readFileSync } = require("node:fs");
const { basename } = require("node:path");
const { chromium } = require("playwright-core");

const flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"];
const quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync"];

/** ComfyUI's page in a browser of its own, and the errors there that the pack may have to do with. */
async function opened(url) {
  const browser = await chromium.launch({ executablePath: process.env.CHROMIUM, args: [...flags, ...quiet] });
  const page = await browser.newPage({ viewport: { width: 1600, height: 900 } });
  const errors = [];
  page.on("pageerror", (error) => errors.push(String(error)));
  page.on("console", (message) => {
    const said = `${message.text()} ${message.location().url}`;
    if (["error", "warning"].includes(message.type()) && /sphere|Unhandled message/i.test(said)) errors.push(said);
  });
  await page.goto(url);
  await page.waitForFunction(() => window.app?.graph && window.app?.canvas, null, { timeout: 120000 });
  await page.waitForTimeout(3000); // newer pages still load their default workflow, and would replace ours
  return { browser, page, errors };
}

/** Drops a file on the canvas. */
async function drop(page, name, type, content) {
  await page.evaluate(
    async ([name, type, content]) => {
      const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
      const dataTransfer = new DataTransfer();
      dataTransfer.items.add(new File([bytes], name, { type }));
      const canvas = document.querySelector("#graph-canvas") ?? document.querySelector("canvas");
      for (const kind of ["dragenter", "dragover", "drop"]) {
        canvas.dispatchEvent(new DragEvent(kind, { dataTransfer, bubbles: true, cancelable: true }));
      }
    },
    [name, type, content.toString("base64")],
  );
}

/** Drops a workflow, waits until its nodes are there, and returns the types of those that the page does not know. */
async function dropWorkflow(page, file) {
  const content = readFileSync(file);
  await drop(page, basename(file), "application/json", content);
  const count = JSON.parse(content).nodes.length;
  await page.waitForFunction((count) => window.app.graph._nodes.length === count, count, { timeout: 60000 });
  return page.evaluate(() =>
    window.app.graph._nodes.map((node) => node.type).filter((type) => !window.LiteGraph.registered_node_types[type]),
  );
}

const promptOf = (page) => page.evaluate(async () => (await window.app.graphToPrompt()).output);

async function main(url, file) {
  const { browser, page } = await opened(url);
  const missing = await dropWorkflow(page, file);
  const seen = { missing, prompt: await promptOf(page) };
  await page.evaluate(() => window.app.queuePrompt(0, 1));
  if (process.env.SAYS) {
    const said = (type) =>
      window.app.graph._nodes
        .find((node) => node.type === type)
        .widgets?.find((widget) => ["summary", "verdict", "said"].includes(widget.name))?.value;
    seen.said = await (await page.waitForFunction(said, process.env.SAYS, { timeout: 120000 })).jsonValue();
    seen.later = await promptOf(page);
  }
  if (process.env.SCREENSHOT) await page.screenshot({ path: process.env.SCREENSHOT });
  console.log(JSON.stringify(seen));
  await browser.close();
}

/** Runs `main` with the arguments of the command line. */
function run(main) {
  main(...process.argv.slice(2)).catch((error) => {
    console.error(error);
    process.exit(1);
  });
}

module.exports = { opened, drop, dropWorkflow, promptOf, run };
if (require.main === module) run(main);
