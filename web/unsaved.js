/** Keeps a widget, the last of its node, out of the workflow: it is neither saved with it nor sent with the prompt. */
export function unsaved(node, widget) {
  widget.serialize = false;
  widget.options = { ...widget.options, serialize: false };
  // The page of 2024 saves a value of each widget all the same.
  const { onSerialize } = node;
  node.onSerialize = function ({ widgets_values: values }) {
    onSerialize?.apply(this, arguments);
    if (values?.length && values.length === this.widgets.indexOf(widget) + 1) values.pop();
  };
  return widget;
}
