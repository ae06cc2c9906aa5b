// Keys of the page of `vlmdpo compare`; they press the buttons that are there.
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if (event.target.closest("input, textarea, select, [contenteditable=true]")) return;
  const keys = {
    1: "vote-left", 2: "vote-right", ArrowLeft: "vote-left", ArrowRight: "vote-right",
    t: "vote-tie", s: "next", n: "next", u: "undo",
  };
  const name = keys[event.key];
  const found = name && document.getElementById(name);
  const button = found && (found.matches("button") ? found : found.querySelector("button"));
  if (button && !button.disabled) {
    event.preventDefault();
    button.click();
  }
});
