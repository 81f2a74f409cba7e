//! Bodies that are compressed, as classifiers see them.

use std::io::{ErrorKind, Read};

use brotli_decompressor::Decompressor;
use bytes::Bytes;
use flate2::read::{DeflateDecoder, MultiGzDecoder, ZlibDecoder};
use http::{HeaderMap, header::CONTENT_ENCODING};
use ruzstd::decoding::StreamingDecoder;

use super::hint;

/// What a body may expand to, whatever the layer may read: 1 MiB.
const MOST: usize = 1 << 20;

/// The largest window of zstd that RFC 9659 allows for HTTP. A decoder allocates it.
const ZSTD_WINDOW: u64 = 8 << 20;

/// Returns the beginning of a body without its compression: at most `most` bytes, or 1 MiB.
///
/// A body in another format than gzip, deflate, brotli or zstd, or in none, is returned as it is, and so is one that can't be
/// decoded.
pub(crate) fn decoded(headers: &HeaderMap, body: Bytes, most: usize) -> Bytes {
    let most = most.min(MOST);
    let says = |encoding| {
        hint::values(headers, CONTENT_ENCODING.as_str()).any(|value| value.eq_ignore_ascii_case(encoding))
    };
    // By its first bytes, not by its header, where a format has such: clients that decode bodies may leave the header.
    let decoded = if body.starts_with(&[0x1f, 0x8b, 8]) {
        beginning(MultiGzDecoder::new(&body[..]), most)
    } else if body.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        let decoder = StreamingDecoder::new_with_max_window_size(&body[..], ZSTD_WINDOW).ok();
        // It does not say why it ends. No text begins so.
        decoder.map(|decoder| read(decoder, most).0).filter(|decoded| !decoded.is_empty())
    } else if says("br") {
        // Any bytes may be the beginning of brotli. So a body that was decoded already shows by its text.
        let (decoded, end) = read(Decompressor::new(&body[..], 4_096), most);
        (end.is_none() || !decoded.is_empty() && str::from_utf8(&body).is_err()).then_some(decoded)
    } else if says("deflate") {
        // RFC 9110 means zlib's format. Some servers leave out its frame. Then only data that ends well proves the format.
        beginning(ZlibDecoder::new(&body[..]), most).or_else(|| {
            let (decoded, end) = read(DeflateDecoder::new(&body[..]), most);
            end.is_none().then_some(decoded)
        })
    } else {
        None
    };
    decoded.map_or(body, Bytes::from)
}

/// Reads what there is: the layer may have the beginning of a body only. `None` if the data is in another format.
fn beginning(decoder: impl Read, most: usize) -> Option<Vec<u8>> {
    let (decoded, end) = read(decoder, most);
    let is_of_the_format = end.is_none_or(|error| error == ErrorKind::UnexpectedEof);
    (is_of_the_format && !decoded.is_empty()).then_some(decoded)
}

/// Returns what could be read, and the error that ended it.
fn read(decoder: impl Read, most: usize) -> (Vec<u8>, Option<ErrorKind>) {
    let mut decoded = Vec::new();
    let end = decoder.take(most as u64).read_to_end(&mut decoded);
    (decoded, end.err().map(|error| error.kind()))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use brotli::enc::BrotliEncoderParams;
    use flate2::{
        Compression,
        write::{DeflateEncoder, GzEncoder, ZlibEncoder},
    };
    use http::HeaderValue;
    use proptest::prelude::*;
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};

    use super::*;

    const TEXT: &[u8] = br#"{"error":{"code":"invalid_api_key"}}"#;

    macro_rules! compressed {
        ($encoder:ident, $body:expr) => {{
            let mut encoder = $encoder::new(Vec::new(), Compression::default());
            encoder.write_all($body).unwrap();
            encoder.finish().unwrap()
        }};
    }

    fn brotli(body: &[u8]) -> Vec<u8> {
        let mut compressed = Vec::new();
        brotli::BrotliCompress(&mut &body[..], &mut compressed, &BrotliEncoderParams::default()).unwrap();
        compressed
    }

    fn zstd(body: &[u8]) -> Vec<u8> {
        compress_to_vec(body, CompressionLevel::Fastest)
    }

    fn decode(encoding: &'static str, body: &[u8], most: usize) -> Vec<u8> {
        let headers = HeaderMap::from_iter([(CONTENT_ENCODING, HeaderValue::from_static(encoding))]);
        decoded(&headers, Bytes::copy_from_slice(body), most).to_vec()
    }

    #[test]
    fn gzip_and_both_kinds_of_deflate_are_decoded() {
        assert_eq!(decode("gzip", &compressed!(GzEncoder, TEXT), 1_000), TEXT);
        assert_eq!(decode("", &compressed!(GzEncoder, TEXT), 1_000), TEXT);
        assert_eq!(decode("Deflate", &compressed!(ZlibEncoder, TEXT), 1_000), TEXT);
        assert_eq!(decode("deflate", &compressed!(DeflateEncoder, TEXT), 1_000), TEXT);
    }

    #[test]
    fn brotli_and_zstd_are_decoded() {
        let long = TEXT.repeat(1_000);
        for text in [TEXT, &long] {
            assert_eq!(decode("br", &brotli(text), 100_000), text);
            assert_eq!(decode("zstd", &zstd(text), 100_000), text);
            assert_eq!(decode("", &zstd(text), 100_000), text);
        }
        // Without the header, nobody knows.
        assert_eq!(decode("", &brotli(&long), 100_000), brotli(&long));
    }

    #[test]
    fn a_body_that_is_plain_already_stays() {
        for encoding in ["gzip", "deflate", "br", "zstd", "identity"] {
            assert_eq!(decode(encoding, TEXT, 1_000), TEXT, "{encoding}");
        }
        assert_eq!(decode("gzip", b"", 1_000), b"");
        // A text that begins as brotli does.
        let text = b"QeFg Lyz3BHoGKHVW:mWV6Es";
        assert_eq!(decode("br", text, 1_000), text);
    }

    #[test]
    fn the_beginning_of_a_body_is_decoded_in_part() {
        let text: Vec<u8> = (0..10_000_u32).flat_map(u32::to_le_bytes).collect();
        let body = compressed!(GzEncoder, &text);
        let part = decode("gzip", &body[..body.len() / 2], usize::MAX);
        assert!(part.len() > 1_000 && text.starts_with(&part), "{}", part.len());
        let body = brotli(&text);
        let part = decode("br", &body[..body.len() / 2], usize::MAX);
        assert!(part.len() > 1_000 && text.starts_with(&part), "{}", part.len());
    }

    #[test]
    fn a_bomb_does_not_expand_beyond_the_limit() {
        let bomb = compressed!(GzEncoder, &vec![0; 4 * MOST]);
        assert!(bomb.len() < 10_000);
        assert_eq!(decode("gzip", &bomb, 4_096).len(), 4_096);
        assert_eq!(decode("gzip", &bomb, usize::MAX).len(), MOST);
        let bomb = compressed!(ZlibEncoder, &vec![0; 4 * MOST]);
        assert_eq!(decode("deflate", &bomb, usize::MAX).len(), MOST);
        let bomb = brotli(&vec![0; 4 * MOST]);
        assert_eq!(decode("br", &bomb, 4_096).len(), 4_096);
        assert_eq!(decode("br", &bomb, usize::MAX).len(), MOST);
        let bomb = zstd(&vec![0; 4 * MOST]);
        assert_eq!(decode("zstd", &bomb, 4_096).len(), 4_096);
        assert_eq!(decode("zstd", &bomb, usize::MAX).len(), MOST);
    }

    #[test]
    fn zstd_gets_no_larger_window_than_http_allows() {
        // RFC 8878: a window of 2^(10 + exponent) bytes, and one block, which is the text.
        let frame = |exponent: u8| {
            [&[0x28, 0xb5, 0x2f, 0xfd, 0, exponent << 3, 4 << 3 | 1, 0, 0], &b"text"[..]].concat()
        };
        assert_eq!(decode("zstd", &frame(13), usize::MAX), b"text");
        assert_eq!(decode("zstd", &frame(14), usize::MAX), frame(14));
    }

    proptest! {
        #[test]
        fn f28_no_compressed_body_panics(body in prop::collection::vec(any::<u8>(), 0..100)) {
            let gzip = [&[0x1f, 0x8b, 8][..], &body].concat();
            prop_assert!(decode("gzip", &gzip, 1_000).len() <= 1_000);
            prop_assert!(decode("deflate", &body, 1_000).len() <= 1_000);
            prop_assert!(decode("br", &body, 1_000).len() <= 1_000);
            let zstd = [&[0x28, 0xb5, 0x2f, 0xfd][..], &body].concat();
            prop_assert!(decode("zstd", &zstd, 1_000).len() <= 1_000);
        }
    }
}
