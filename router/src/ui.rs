//! The page at `/ui`: three files, embedded, which need nothing from elsewhere. It reads `/debug/state` once a second.
#![forbid(unsafe_code)]

use hyper::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, HeaderName, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};

/// What goes with every part of the page.
pub const HEADERS: [(HeaderName, &str); 4] = [
    (
        CONTENT_SECURITY_POLICY,
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (REFERRER_POLICY, "no-referrer"),
    // After an upgrade of the router the old page must not read the new state.
    (CACHE_CONTROL, "no-cache"),
];

/// A part of the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asset {
    /// `/ui`
    Page,
    /// `/ui/app.js`
    Script,
    /// `/ui/style.css`
    Style,
}

impl Asset {
    /// Its media type and its text.
    pub const fn content(self) -> (&'static str, &'static str) {
        match self {
            Self::Page => ("text/html; charset=utf-8", include_str!("ui/index.html")),
            Self::Script => ("text/javascript; charset=utf-8", include_str!("ui/app.js")),
            Self::Style => ("text/css; charset=utf-8", include_str!("ui/style.css")),
        }
    }
}
