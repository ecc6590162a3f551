"use strict";
// The page of `volseg view`: one scan, with its labels if there are any.

const volseg = {
  receive([, content]) {
    document.title = content.title;
    document.getElementById("scan").textContent = content.title;
    document.getElementById("labels").textContent = content.subtitle;
    openViewer(document.getElementById("viewer"), content);
  },
};
