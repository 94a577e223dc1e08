/* The page's own script: panels, theme, the address, clicks on lists. It knows no API; events go to Gradio. */
window.windfarm = (() => {
  const root = document.documentElement;
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  let key = "";

  /* Light and dark: the system's choice until somebody presses the button. */
  const wantsDark = () => {
    const chosen = localStorage.getItem("windfarm-theme");
    return chosen ? chosen === "dark" : dark.matches;
  };
  const applyTheme = () => document.body?.classList.toggle("dark", wantsDark());
  dark.addEventListener("change", applyTheme);
  /* Gradio's buttons of the question are pictures without a name. */
  const nameButtons = () => {
    document.querySelector("#wf-question .submit-button:not([aria-label])")?.setAttribute("aria-label", "Send");
    document.querySelector("#wf-question .stop-button:not([aria-label])")?.setAttribute("aria-label", "Stop");
  };
  const begin = () => {
    applyTheme();
    nameButtons();
    new MutationObserver(nameButtons).observe(document.body, { childList: true, subtree: true });
    /* Gradio sets the class itself once it has started; the person's choice wins. */
    new MutationObserver(() => {
      if (document.body.classList.contains("dark") !== wantsDark()) applyTheme();
    }).observe(document.body, { attributes: true, attributeFilter: ["class"] });
  };
  /* Gradio may put this script into a page that stands already. */
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", begin);
  else begin();
  const toggleTheme = () => {
    localStorage.setItem("windfarm-theme", wantsDark() ? "light" : "dark");
    applyTheme();
  };

  /* The side bar and the panel on the right. */
  const isPhone = () => window.matchMedia("(max-width: 820px)").matches;
  let isSourcesClosed = false;
  const setPanel = (name) => {
    /* Sources come up by themselves until somebody closes them. */
    if (root.dataset.panel === "sources" && !name) isSourcesClosed = true;
    if (name === "sources") isSourcesClosed = false;
    name ? (root.dataset.panel = name) : delete root.dataset.panel;
  };
  const togglePanel = (name) => setPanel(root.dataset.panel === name ? "" : name);
  const toggleSide = () => {
    const shown = isPhone() ? "open" : "closed";
    root.dataset.side === shown ? delete root.dataset.side : (root.dataset.side = shown);
  };
  const closeOnPhone = () => {
    if (isPhone()) delete root.dataset.side;
    return [];
  };

  /* The open conversation is part of the address, so a reload comes back to it. */
  const conversationInAddress = () => new URLSearchParams(location.search).get("c") || "";
  const conversationToAddress = (id) => {
    const url = new URL(location.href);
    id ? url.searchParams.set("c", id) : url.searchParams.delete("c");
    if (url.href !== location.href) history.replaceState(history.state, "", url);
  };

  /* Uploads carry the key, like all other calls. */
  const fetchPlain = window.fetch.bind(window);
  window.fetch = (input, init = {}) => {
    const url = new URL(input instanceof Request ? input.url : String(input), location.href);
    if (key && url.origin === location.origin && url.pathname.endsWith("/gradio_api/upload")) {
      const headers = new Headers(init.headers || (input instanceof Request ? input.headers : undefined));
      headers.set("authorization", `Bearer ${key}`);
      return fetchPlain(input, { ...init, headers });
    }
    return fetchPlain(input, init);
  };
  const setKey = (value) => {
    /* Gradio writes no empty value, so it would keep the key of somebody who signed out. */
    if (key && !value) localStorage.removeItem("windfarm-key");
    key = value || "";
  };

  /* Files may be dropped anywhere. */
  const fileInput = () => document.querySelector("#wf-files input[type=file]");
  const addFiles = (files) => {
    const input = fileInput();
    if (!input || !files.length) return;
    setPanel("documents");
    input.files = files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  };
  const isOverFileField = (event) => event.target.closest?.("#wf-files");
  const hasFiles = (event) => key && [...(event.dataTransfer?.types || [])].includes("Files");
  window.addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    root.dataset.dropping = "true";
  });
  window.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) delete root.dataset.dropping;
  });
  window.addEventListener("drop", (event) => {
    delete root.dataset.dropping;
    if (!hasFiles(event) || isOverFileField(event)) return;
    event.preventDefault();
    addFiles(event.dataTransfer.files);
  });

  /* Clicks on lists. `data-action` names what to do; the row says to what. */
  const listClick = (event, send) => {
    const button = event.target.closest("[data-action]");
    if (!button) return;
    const row = button.closest("[data-id]");
    const id = row?.dataset.id;
    const action = button.dataset.action;
    if (action === "rename") return rename(row, (title) => send("rename", { id, title }));
    if (action === "delete") return confirmTwice(button, () => send("delete", { id }));
    if (action === "cite") {
      const message = button.closest("[data-message]").dataset.message;
      const isOpen = button.getAttribute("aria-expanded") === "true";
      return send("cite", { message, number: isOpen ? 0 : Number(button.dataset.number) });
    }
    if (action === "open") closeOnPhone();
    send(action, { id });
  };

  const rename = (row, done) => {
    if (row.querySelector("input")) return;
    const title = row.querySelector(".wf-open");
    const input = document.createElement("input");
    input.value = title.textContent;
    input.setAttribute("aria-label", "New title");
    title.hidden = true;
    row.prepend(input);
    input.focus();
    input.select();
    let isFinished = false;
    const finish = (isKept) => {
      if (isFinished) return;
      isFinished = true;
      const value = input.value.trim();
      input.remove();
      title.hidden = false;
      if (isKept && value && value !== title.textContent) {
        title.textContent = value;
        done(value);
      }
    };
    input.addEventListener("keydown", (event) => {
      if (event.key === "Enter") finish(true);
      if (event.key === "Escape") finish(false);
      event.stopPropagation();
    });
    input.addEventListener("blur", () => finish(true));
  };

  /* A first press asks, a second one within three seconds does it. */
  const confirmTwice = (button, done) => {
    if (button.classList.contains("is-asking")) {
      button.classList.remove("is-asking");
      return done();
    }
    button.classList.add("is-asking");
    setTimeout(() => button.classList.remove("is-asking"), 3000);
  };
  const confirmed = (question, values) => {
    if (!window.confirm(question)) throw new Error("Not confirmed");
    return values;
  };

  /* Marks such as [1] in an answer open their source. */
  const marks = /^#cite-(.+)-(\d+)$/;
  document.addEventListener(
    "click",
    (event) => {
      const link = event.target.closest?.("a[href]");
      const match = link && marks.exec(link.getAttribute("href"));
      if (match) {
        event.preventDefault();
        event.stopPropagation();
        setPanel("sources");
        if (match[1] !== "live") windfarm.openSource?.(match[1], Number(match[2]));
        return;
      }
      const button = event.target.closest?.("[data-action]");
      if (!button) return;
      const { action, panel } = button.dataset;
      if (action === "side") toggleSide();
      if (action === "panel") panel ? togglePanel(panel) : setPanel("");
      if (action === "theme") toggleTheme();
      if (action === "attach") {
        setPanel("documents");
        fileInput()?.click();
      }
    },
    true,
  );
  const showMarked = (element) => {
    const isWide = window.matchMedia("(min-width: 1100px)").matches;
    if (isWide && !isSourcesClosed && element.querySelector(".wf-source")) setPanel("sources");
    requestAnimationFrame(() => {
      const mark = element.querySelector(".wf-source.is-open mark");
      if (!mark) return;
      const box = mark.closest(".wf-passage");
      if (mark.classList.contains("wf-spot")) box.scrollTop = mark.offsetTop - box.clientHeight / 4;
      else box.scrollTop = mark.offsetTop - box.offsetTop - box.clientHeight / 4;
      mark.closest(".wf-source").scrollIntoView({ block: "nearest" });
    });
  };

  return { setKey, closeOnPhone, conversationInAddress, conversationToAddress, listClick, confirmed, showMarked };
})();
