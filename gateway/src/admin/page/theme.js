// The colour theme: light, dark, or that of the system.

const THEMES = { auto: "as the system", light: "light", dark: "dark" };
const STORED = "admin-theme";

export function startTheme(button) {
  let theme = localStorage.getItem(STORED) ?? "auto";
  const use = () => {
    document.documentElement.dataset.theme = theme;
    button.ariaLabel = button.title = `Colours: ${THEMES[theme]}`;
  };
  button.addEventListener("click", () => {
    const names = Object.keys(THEMES);
    theme = names[(names.indexOf(theme) + 1) % names.length];
    localStorage.setItem(STORED, theme);
    use();
  });
  use();
}
