// Shows on a node what it says about a run.
import { app } from "../../scripts/app.js";
import { ComfyWidgets } from "../../scripts/widgets.js";
import { unsaved } from "./unsaved.js";

const SHOWN = {
  SphereGuideReport: "summary",
  SphereGuideEpsilonScalingCalibrate: "verdict",
  SphereGuideAMEDTrain: "said",
  SphereGuideAMEDScheduler: "said",
};

app.registerExtension({
  name: "SphereGuide.Report",
  beforeRegisterNodeDef(nodeType, nodeData) {
    const shown = SHOWN[nodeData.name];
    if (!shown) return;
    const { onExecuted } = nodeType.prototype;
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      if (!output?.text) return;
      let widget = this.widgets?.find((widget) => widget.name === shown);
      if (!widget) {
        widget = unsaved(this, ComfyWidgets.STRING(this, shown, ["STRING", { multiline: true }], app).widget);
        (widget.element ?? widget.inputEl).readOnly = true; // the latter before 2025
      }
      widget.value = output.text.join("\n");
      this.setSize?.([this.size[0], Math.max(this.size[1], this.computeSize()[1])]);
    };
  },
});
