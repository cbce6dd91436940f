// node page.cjs URL WORKFLOW.json: drops the file on the canvas of ComfyUI's page, as a person does, queues it with the
// page's own code, and prints what the page made of it as JSON. Serves the page of 2024 and the newer ones. With
// SAYS set to the type of a node it waits for the run, and prints what that node says on itself, and the prompt after
// that; SCREENSHOT names a PNG to write at the end.
const { readFileSync } = require("node:fs");
const { basename } = require("node:path");
const { chromium } = require("playwright-core");

const [url, file] = process.argv.slice(2);
const flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"];
const quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync"];

(async () => {
  const browser = await chromium.launch({ executablePath: process.env.CHROMIUM, args: [...flags, ...quiet] });
  const page = await browser.newPage({ viewport: { width: 1600, height: 900 } });
  await page.goto(url);
  await page.waitForFunction(() => window.app?.graph && window.app?.canvas, null, { timeout: 120000 });
  await page.waitForTimeout(3000); // newer pages still load their default workflow, and would replace ours

  const text = readFileSync(file, "utf8");
  await page.evaluate(
    ([text, name]) => {
      const dataTransfer = new DataTransfer();
      dataTransfer.items.add(new File([text], name, { type: "application/json" }));
      const canvas = document.querySelector("#graph-canvas") ?? document.querySelector("canvas");
      for (const kind of ["dragenter", "dragover", "drop"]) {
        canvas.dispatchEvent(new DragEvent(kind, { dataTransfer, bubbles: true, cancelable: true }));
      }
    },
    [text, basename(file)],
  );
  const count = JSON.parse(text).nodes.length;
  await page.waitForFunction((count) => window.app.graph._nodes.length === count, count, { timeout: 60000 });

  const missing = await page.evaluate(() =>
    window.app.graph._nodes.map((node) => node.type).filter((type) => !window.LiteGraph.registered_node_types[type]),
  );
  const prompt = await page.evaluate(async () => (await window.app.graphToPrompt()).output);
  await page.evaluate(() => window.app.queuePrompt(0, 1));
  const seen = { missing, prompt };
  if (process.env.SAYS) {
    const said = (type) =>
      window.app.graph._nodes
        .find((node) => node.type === type)
        .widgets?.find((widget) => ["summary", "verdict"].includes(widget.name))?.value;
    seen.said = await (await page.waitForFunction(said, process.env.SAYS, { timeout: 120000 })).jsonValue();
    seen.later = await page.evaluate(async () => (await window.app.graphToPrompt()).output);
  }
  if (process.env.SCREENSHOT) await page.screenshot({ path: process.env.SCREENSHOT });
  console.log(JSON.stringify(seen));
  await browser.close();
})().catch((error) => {
  console.error(error);
  process.exit(1);
});
