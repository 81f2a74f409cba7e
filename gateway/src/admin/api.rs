//! The JSON API that `openapi.json` describes.

use std::{panic, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{
        DefaultBodyLimit, FromRequestParts, Path, Query, State,
        rejection::{BytesRejection, PathRejection, QueryRejection},
    },
    http::{HeaderMap, StatusCode, header::CONTENT_TYPE, request::Parts},
    response::{
        IntoResponse,
        sse::{KeepAlive, Sse},
    },
    routing::{delete, get, post},
};
use serde::{Deserialize, Serialize};
use tower_key_rotation::{Explanation, KeyId, KeyPool, KeySpec, OperateError, Traits};

use super::{
    action::{Action, cannot_name},
    callers,
    import::{self, Imported},
    keys::{Look, Shown},
    live::Live,
    refusal::Refusal,
    scopes,
    search::{Page, Search, rests},
    upstreams::{self, Named},
};
use crate::media_type::media_type;

const DESCRIPTION: &str = include_str!("openapi.json");

/// Largest request body: room for some 10,000 keys.
const LARGEST_BODY: usize = 2 << 20;

/// Interval of comments in an event stream, by which a client detects a dead connection.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

pub(super) fn router(live: Arc<Live>) -> Router {
    Router::new()
        .route("/openapi.json", get(([(CONTENT_TYPE, "application/json")], DESCRIPTION)))
        .route("/events", get(events))
        .route("/explain", get(explain))
        .route("/scopes", get(scopes::list))
        .route("/upstreams", get(upstreams::list))
        .route("/callers", get(callers::list))
        .route("/keys", get(list).post(add))
        // Not below `/keys/`: a key may have the id `import`, or the id `.`, which browsers remove from a path.
        .route("/keys:import", post(import))
        .route("/keys:reset", post(reset_all))
        .route("/keys/{id}", delete(remove))
        .route("/keys/{id}/reset", post(reset))
        .route("/keys/{id}/disable", post(disable))
        .route("/keys/{id}/enable", post(enable))
        .fallback(async || Refusal::new(StatusCode::NOT_FOUND, "there is no such path"))
        .method_not_allowed_fallback(async || {
            Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "this path does not support the method")
        })
        .layer(DefaultBodyLimit::max(LARGEST_BODY))
        .with_state(live)
}

async fn events(State(live): State<Arc<Live>>) -> Result<impl IntoResponse, Refusal> {
    let too_many = || Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "too many event streams: close a page");
    let events = live.events().ok_or_else(too_many)?;
    Ok(Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Described {
    scope: Option<String>,
    session: Option<String>,
    tokens: Option<u64>,
    // `Named` reads it.
    #[allow(dead_code)]
    upstream: Option<String>,
}

async fn explain(
    named: Named,
    described: Result<Query<Described>, QueryRejection>,
) -> Result<Json<Explanation>, Refusal> {
    let Query(Described { scope, session, tokens, .. }) =
        described.map_err(|error| Refusal::bad_request(error.body_text()))?;
    let traits = scope.into_iter().fold(Traits::new(), Traits::scope);
    let traits = session.into_iter().fold(traits, Traits::session);
    let traits = tokens.into_iter().fold(traits, Traits::tokens);
    Ok(Json(named.pool().explain(&traits)))
}

async fn list(
    State(live): State<Arc<Live>>,
    search: Result<Query<Search>, QueryRejection>,
) -> Result<Json<Page>, Refusal> {
    let Query(search) = search.map_err(|error| Refusal::bad_request(error.body_text()))?;
    live.look(Look::Everything);
    search.of(&live).map(Json)
}

async fn add(
    State(live): State<Arc<Live>>,
    named: Named,
    body: Result<Bytes, BytesRejection>,
) -> Result<(StatusCode, Json<Shown>), Refusal> {
    let spec = KeySpec::from_json(body?).map_err(|error| Refusal::bad_request(error.to_string()))?;
    let id = spec.id.to_string();
    if let Some(reason) = cannot_name(&id) {
        return Err(Refusal::bad_request(reason));
    }
    let insert = |pool: KeyPool, _| async move { pool.insert_all([spec]).await.into_iter().collect() };
    change(live, named, id, Action::Add, insert).await.map(|key| (StatusCode::CREATED, key))
}

async fn import(
    State(live): State<Arc<Live>>,
    named: Named,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Imported>, Refusal> {
    let keys = import::read(&media_type(&headers).unwrap_or_default(), &body?)?;
    to_the_end(async move {
        let imported = import::add(&named, keys).await;
        live.look(Look::Everything);
        Ok(Json(imported))
    })
    .await
}

async fn reset(State(live): State<Arc<Live>>, named: Named, Id(id): Id) -> Result<Json<Shown>, Refusal> {
    change(live, named, id, Action::Reset, |pool, id| async move { pool.reset(id).await }).await
}

async fn disable(State(live): State<Arc<Live>>, named: Named, Id(id): Id) -> Result<Json<Shown>, Refusal> {
    change(live, named, id, Action::Disable, |pool, id| async move { pool.disable(id).await }).await
}

async fn enable(State(live): State<Arc<Live>>, named: Named, Id(id): Id) -> Result<Json<Shown>, Refusal> {
    change(live, named, id, Action::Enable, |pool, id| async move { pool.enable(id).await }).await
}

async fn remove(State(live): State<Arc<Live>>, named: Named, Id(id): Id) -> Result<StatusCode, Refusal> {
    do_with(live, named, id, Action::Remove, |pool, id| async move { pool.remove(id).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Default, Serialize)]
struct Resets {
    reset: Vec<KeyId>,
    failed: Vec<NotReset>,
}

#[derive(Serialize)]
struct NotReset {
    id: KeyId,
    error: String,
}

async fn reset_all(State(live): State<Arc<Live>>, named: Named) -> Json<Resets> {
    to_the_end(async move {
        let mut resets = Resets::default();
        let pool = named.pool();
        for key in pool.stats().keys.into_iter().filter(|key| rests(key.status)) {
            let done = pool.reset(&key.id).await;
            Action::Reset.log(&named, key.id.as_str(), &done);
            match done {
                Ok(()) => resets.reset.push(key.id),
                Err(error) => {
                    resets.failed.push(NotReset { id: key.id, error: Action::Reset.failed(&error) });
                }
            }
        }
        live.look(Look::Everything);
        Json(resets)
    })
    .await
}

/// Changes a key and returns its new state.
async fn change<F>(
    live: Arc<Live>,
    named: Named,
    id: String,
    action: Action,
    doing: impl FnOnce(KeyPool, String) -> F,
) -> Result<Json<Shown>, Refusal>
where
    F: Future<Output = Result<(), OperateError>> + Send + 'static,
{
    let upstream = named.name().to_owned();
    do_with(live.clone(), named, id.clone(), action, doing).await?;
    let gone = || Refusal::new(StatusCode::NOT_FOUND, format!("there is no key {id:?} any more"));
    live.get(&upstream, &id).map(Json).ok_or_else(gone)
}

async fn do_with<F>(
    live: Arc<Live>,
    named: Named,
    id: String,
    action: Action,
    doing: impl FnOnce(KeyPool, String) -> F,
) -> Result<(), Refusal>
where
    F: Future<Output = Result<(), OperateError>> + Send + 'static,
{
    let doing = doing(named.pool().clone(), id.clone());
    to_the_end(async move {
        let done = doing.await;
        action.log(&named, &id, &done);
        // Also after an error: the pool may have changed although the store failed.
        live.look(Look::Everything);
        done.map_err(|error| Refusal::of(action, &error))
    })
    .await
}

/// Runs an action to its end even if the caller disconnects, so that no change stays half done.
async fn to_the_end<T: Send + 'static>(action: impl Future<Output = T> + Send + 'static) -> T {
    match tokio::spawn(action).await {
        Ok(done) => done,
        Err(error) => panic::resume_unwind(error.into_panic()),
    }
}

/// A key's id in a path.
struct Id(String);

impl<S: Send + Sync> FromRequestParts<S> for Id {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let id: Result<Path<String>, PathRejection> = Path::from_request_parts(parts, state).await;
        id.map(|Path(id)| Self(id)).map_err(|error| Refusal::bad_request(error.body_text()))
    }
}
