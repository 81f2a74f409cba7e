//! The page: embedded files and their security headers.

use axum::{
    Router,
    http::{HeaderValue, header},
    response::{Html, Response},
    routing::get,
};

const PAGE: &str = include_str!("page/index.html");

/// Files of the page: path, media type and content.
const FILES: [(&str, &str, &str); 11] = [
    ("/admin.css", "text/css; charset=utf-8", include_str!("page/admin.css")),
    ("/admin.js", SCRIPT, include_str!("page/admin.js")),
    ("/callers.js", SCRIPT, include_str!("page/callers.js")),
    ("/keys.js", SCRIPT, include_str!("page/keys.js")),
    ("/limits.js", SCRIPT, include_str!("page/limits.js")),
    ("/server.js", SCRIPT, include_str!("page/server.js")),
    ("/table.js", SCRIPT, include_str!("page/table.js")),
    ("/timeline.js", SCRIPT, include_str!("page/timeline.js")),
    ("/dialogs.js", SCRIPT, include_str!("page/dialogs.js")),
    ("/theme.js", SCRIPT, include_str!("page/theme.js")),
    ("/words.js", SCRIPT, include_str!("page/words.js")),
];

const SCRIPT: &str = "text/javascript; charset=utf-8";

/// Content security policy: no external resources, no inline scripts or styles, no framing by other pages.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
    img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

pub(super) fn router() -> Router {
    let page = Router::new().route("/admin", get(Html(PAGE))).route("/admin/", get(Html(PAGE)));
    FILES.into_iter().fold(page, |router, (path, media_type, text)| {
        router.route(&format!("/admin{path}"), get(([(header::CONTENT_TYPE, media_type)], text)))
    })
}

/// Adds security headers to every response of the admin.
pub(super) async fn strictly(mut response: Response) -> Response {
    let strict = [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-store"),
    ];
    for (name, value) in strict {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}
