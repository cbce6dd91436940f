// node session.cjs URL WORKFLOW.json RATE: what a person does with a guided workflow in ComfyUI's page. Drops the file,
// queues it, waits for the image, types RATE into guidance_rate, queues again, and drops the first image, as a PNG, back
// on the canvas. Prints as JSON what the page held after each. SCREENSHOTS names a folder for pictures of it.
const { createHash } = require("node:crypto");
const { join } = require("node:path");
const { opened, drop, dropWorkflow, promptOf, run } = require("./page.cjs");

/** What the guidance node, the workflow and the prompt hold. */
async function held(page) {
  const found = await page.evaluate(async () => {
    const node = window.app.graph._nodes.find((node) => node.type === "SphereGuideDSG");
    const curve = node.widgets.find((widget) => widget.name === "loss curve");
    return {
      rate: node.widgets.find((widget) => widget.name === "guidance_rate").value,
      curve: curve && [...curve.losses],
      height: node.size[1],
      saved: JSON.parse(JSON.stringify(window.app.graph.serialize())).nodes,
    };
  });
  return { ...found, prompt: await promptOf(page) };
}

/** Queues with the keyboard, and returns the image that appears on Save Image: its file, and a digest of its pixels. */
async function queued(page, earlier, meanwhile) {
  await page.keyboard.press("Control+Enter");
  const shown = (earlier) => {
    const { id } = window.app.graph._nodes.find((node) => node.type === "SaveImage");
    const image = window.app.nodeOutputs[id]?.images?.[0];
    return image && image.filename !== earlier && image;
  };
  await meanwhile?.();
  const image = await (await page.waitForFunction(shown, earlier, { timeout: 240000 })).jsonValue();
  const [content, pixels] = await page.evaluate(async ({ filename, subfolder, type }) => {
    const file = await fetch(`/view?${new URLSearchParams({ filename, subfolder, type })}`);
    const blob = await file.blob();
    const picture = await createImageBitmap(blob);
    const context = new OffscreenCanvas(picture.width, picture.height).getContext("2d");
    context.drawImage(picture, 0, 0);
    const { data } = context.getImageData(0, 0, picture.width, picture.height);
    return [[...new Uint8Array(await blob.arrayBuffer())], [...data]];
  }, image);
  const digest = createHash("md5").update(Buffer.from(pixels)).digest("hex");
  return { filename: image.filename, content: Buffer.from(content), pixels: digest };
}

/** Clicks a number on the node, and types another into the box that opens. */
async function type(page, name, value) {
  const [x, y] = await page.evaluate((name) => {
    const { canvas, graph } = window.app;
    const node = graph._nodes.find((node) => node.type === "SphereGuideDSG");
    const widget = node.widgets.find((widget) => widget.name === name);
    const { left, top } = canvas.canvas.getBoundingClientRect();
    const { offset, scale } = canvas.ds;
    const at = [node.pos[0] + node.size[0] / 2, node.pos[1] + (widget.last_y ?? widget.y) + 10];
    return [left + (at[0] + offset[0]) * scale, top + (at[1] + offset[1]) * scale];
  }, name);
  await page.mouse.click(x, y);
  const box = page.locator(".graphdialog input");
  await box.fill(String(value));
  await box.press("Enter");
}

/** Brings the guidance node to the middle of the page. */
async function centre(page) {
  await page.evaluate(() => {
    const { canvas, graph } = window.app;
    const node = graph._nodes.find((node) => node.type === "SphereGuideDSG");
    canvas.ds.scale = 1;
    canvas.ds.offset = [800 - node.pos[0] - node.size[0] / 2, 420 - node.pos[1] - node.size[1] / 2];
    canvas.setDirty(true, true);
  });
  await page.waitForTimeout(500);
}

run(async (url, file, rate) => {
  const { browser, page, errors } = await opened(url);
  const picture = (name) =>
    process.env.SCREENSHOTS && page.screenshot({ path: join(process.env.SCREENSHOTS, `${name}.png`) });
  const missing = await dropWorkflow(page, file);
  await page.keyboard.press("Escape"); // newer pages open on their templates
  await centre(page);
  await picture("dropped");
  const dropped = await held(page);

  const midway = async () => {
    const drawn = () =>
      window.app.graph._nodes.some((node) => node.widgets?.some((widget) => widget.losses?.size > 1));
    await page.waitForFunction(drawn, null, { timeout: 120000 });
    await picture("sampling");
  };
  const first = await queued(page, null, midway);
  const once = { ...(await held(page)), pixels: first.pixels };
  await picture("first");

  await type(page, "guidance_rate", rate);
  const second = await queued(page, first.filename);
  const twice = { ...(await held(page)), pixels: second.pixels };
  await picture("second");

  await page.evaluate(async () => {
    const { api } = await import("/scripts/api.js");
    const node = String(window.app.graph._nodes.find((node) => node.type === "SphereGuideDSG").id);
    for (const told of [{ workflow: "another tab's" }, { step: 0, loss: [1] }]) {
      api.dispatchEvent(new CustomEvent("sphereguide.trace", { detail: { node, steps: 9, ...told } }));
    }
  });
  const elsewhere = await held(page);

  await drop(page, first.filename, "image/png", first.content);
  const restored = (rate) =>
    window.app.graph._nodes
      .find((node) => node.type === "SphereGuideDSG")
      ?.widgets.find((widget) => widget.name === "guidance_rate").value === rate;
  await page.waitForFunction(restored, dropped.rate, { timeout: 60000 });
  await page.waitForTimeout(500);
  const back = await held(page);
  await picture("back");

  console.log(JSON.stringify({ missing, errors, dropped, once, twice, elsewhere, back }));
  await browser.close();
});
