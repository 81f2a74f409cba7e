// Dialogs: add a key, import keys, confirm a removal.

import { at, call, pathOf } from "/admin/server.js";
import { count } from "/admin/words.js";

const element = (id) => document.getElementById(id);

/** Runs an action when a dialog's form is submitted. The dialog stays open if the action fails. */
function onSubmit(dialog, action, failed) {
  for (const button of dialog.querySelectorAll("[data-close]")) button.addEventListener("click", () => dialog.close());
  dialog.querySelector("form").addEventListener("submit", async (event) => {
    event.preventDefault();
    if (dialog.ariaBusy === "true") return;
    dialog.ariaBusy = "true";
    failed("");
    try {
      await action();
    } catch (error) {
      failed(sentence(error.message));
    } finally {
      dialog.ariaBusy = null;
    }
  });
  // A secret must not stay in the page after the dialog closes.
  dialog.addEventListener("close", () => dialog.querySelector("form").reset());
}

export const sentence = (text) => `${text.charAt(0).toUpperCase()}${text.slice(1)}.`;

export function adding(announce) {
  const [dialog, id, secret] = [element("add"), element("add-id"), element("add-secret")];
  const failed = (text) => (element("add-error").textContent = text);
  const add = async () => {
    const name = id.value.trim();
    const key = JSON.stringify({ id: name, secret: secret.value.trim() });
    await call("POST", at("/keys", element("add-upstream").value), key);
    dialog.close();
    announce(`${name} was added.`);
  };
  onSubmit(dialog, add, failed);
  return () => {
    failed("");
    dialog.showModal();
  };
}

function formatOf(text) {
  if (/^\s*\[\[key\]\]\s*$/m.test(text)) return "application/toml";
  return /^\s*[[{]/.test(text) ? "application/json" : "text/plain";
}

export function importing(announce) {
  const [dialog, text, report] = [element("import"), element("import-text"), element("import-report")];
  const failed = (text) => (element("import-error").textContent = text);
  element("import-file").addEventListener("change", async ({ target }) => {
    if (target.files[0]) text.value = await target.files[0].text();
  });
  const send = async () => {
    const format = formatOf(text.value);
    const imported = await call("POST", at("/keys:import", element("import-upstream").value), text.value, format);
    const summary = `${count(imported.added, "key")} added, ${imported.refused} refused`;
    element("import-summary").textContent = `${summary}.`;
    element("import-lines").replaceChildren(...imported.lines.map((line) => outcome(line, format === "application/json" ? "Entry" : "Line")));
    report.hidden = false;
    announce(`${summary}.`);
    // Keep only the refused lines, to be corrected. A second import would refuse the added ones.
    if (format === "text/plain") text.value = onlyRefused(text.value, imported.lines);
    else if (!imported.refused) text.value = "";
  };
  onSubmit(dialog, send, failed);
  return () => {
    failed("");
    report.hidden = true;
    dialog.showModal();
  };
}

function onlyRefused(text, lines) {
  const all = text.split("\n");
  return lines.filter(({ error }) => error).map(({ line }) => all[line - 1]).join("\n");
}

function outcome({ line, id, error }, unit) {
  const item = document.createElement("li");
  item.className = error ? "refused" : "added";
  const [place, name, what] = [0, 1, 2].map(() => item.appendChild(document.createElement("span")));
  place.textContent = `${unit} ${line}`;
  place.className = "soft";
  name.textContent = id ?? "–";
  name.className = "name";
  what.textContent = error ? sentence(error) : "Added.";
  return item;
}

export function removing(announce) {
  const dialog = element("remove-key");
  let removed;
  const remove = async () => {
    await call("DELETE", pathOf(removed));
    dialog.close();
    announce(`${removed.id} was removed.`);
  };
  onSubmit(dialog, remove, (error) => {
    if (!error) return;
    dialog.close();
    announce(error, true);
  });
  return (key) => {
    removed = key;
    element("remove-id").textContent = key.id;
    dialog.showModal();
  };
}
