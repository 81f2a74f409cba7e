//! How a `reqwest` client has to treat redirects for keys to stay where they belong.

use reqwest::{ClientBuilder, redirect::Policy};

/// Has a client follow redirects within an origin only, and send no `Referer`.
///
/// `reqwest` follows redirects below this crate's layers, with the key in the request. Where one leads to
/// another host it removes `Authorization`, but no other header, and it hands the query on in `Referer`. So a
/// key in a header of another name, or in the query, would reach whatever host a service names.
///
/// A redirect to another origin (scheme, host and port) is not followed but returned, as any response is:
/// `Location` says where it leads, and a client without keys can go there. Within an origin, redirects are
/// followed up to the 10 of [`Policy::default`]. It replaces a redirect policy that was set before.
///
/// ```
/// use tower::ServiceBuilder;
/// use tower_key_rotation::{Inject, KeyPool, KeyRotationLayer, same_origin_redirects};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let pool = KeyPool::builder().key("alpha", "sk-1").inject(Inject::header("x-api-key")).build()?;
/// let client = same_origin_redirects(reqwest::Client::builder()).build()?;
/// let client = ServiceBuilder::new().layer(KeyRotationLayer::new(&pool)).service(client);
/// # let _ = client;
/// # Ok(())
/// # }
/// ```
pub fn same_origin_redirects(client: ClientBuilder) -> ClientBuilder {
    let same_origin = Policy::custom(|attempt| {
        let stays = attempt.previous().last().is_none_or(|from| from.origin() == attempt.url().origin());
        if stays { Policy::default().redirect(attempt) } else { attempt.stop() }
    });
    client.redirect(same_origin).referer(false)
}
