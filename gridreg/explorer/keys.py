"""Keys for sliders and menus in JupyterLab, which would take arrows and letters for commands to the notebook.

Without this an arrow pressed on a slider also moves the cursor to another cell, and typing in a menu can delete one.
"""

from __future__ import annotations

import anywidget


class WidgetKeys(anywidget.AnyWidget):
    """Nothing to see; put beside other widgets, it keeps keys pressed in them from the notebook.

    Keys with Ctrl, Alt or ⌘, Shift+Enter and Escape still reach it.
    """

    _esm = """
    const keep = (event) => {
      const command = event.ctrlKey || event.metaKey || event.altKey || (event.shiftKey && event.key === "Enter");
      if (!command && event.key !== "Escape") event.stopPropagation();
    };
    function render({ el }) {
      el.style.display = "none";
      const attach = (frames) => {  // el is put into the page some frames after this call
        const output = el.closest(".jp-OutputArea-output");
        if (output) output.addEventListener("keydown", keep);
        else if (frames) requestAnimationFrame(() => attach(frames - 1));
      };
      attach(100);
    }
    export default { render };
    """
