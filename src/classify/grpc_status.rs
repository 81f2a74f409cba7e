//! The status of a gRPC call, `grpc-status`, and the details beside it: in trailers, or in the head of a response that has no
//! message.

use std::time::Duration;

use base64::{Engine, prelude::BASE64_STANDARD_NO_PAD};
use http::HeaderMap;

use super::hint;

/// A gRPC status: grpc.github.io/grpc/core/md_doc_statuscodes.html.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct GrpcStatus {
    pub(super) code: u32,
    /// Of each `google.rpc.ErrorInfo` in the details.
    pub(super) reasons: Vec<String>,
    /// Of `grpc-retry-pushback-ms`, or of a `google.rpc.RetryInfo` in the details.
    pub(super) wait: Option<Duration>,
}

impl GrpcStatus {
    pub(super) fn of(headers: &HeaderMap) -> Option<Self> {
        let text = |name| hint::values(headers, name).next();
        let mut status = Self { code: text("grpc-status")?.parse().ok()?, ..Self::default() };
        if let Some(details) = text("grpc-status-details-bin") {
            let details = BASE64_STANDARD_NO_PAD.decode(details.trim_end_matches('='));
            status.read(&details.unwrap_or_default());
        }
        let pushback = text("grpc-retry-pushback-ms").and_then(|millis| millis.parse().ok());
        status.wait = pushback.map(Duration::from_millis).or(status.wait);
        Some(status)
    }

    /// Reads a `google.rpc.Status`: its third field is a list of `google.protobuf.Any`.
    fn read(&mut self, status: &[u8]) {
        for detail in Fields(status).filter_map(|field| field.bytes(3)) {
            let part = |number| Fields(detail).find_map(|field| field.bytes(number)).unwrap_or_default();
            let (kind, message) = (part(1), part(2));
            if kind.ends_with(b"google.rpc.RetryInfo") {
                let delay = Fields(message).find_map(|field| field.bytes(1)).unwrap_or_default();
                let part = |number| Fields(delay).find_map(|field| field.number(number)).unwrap_or(0);
                // A delay below zero is a number above what a duration of protobuf may be.
                let (seconds, nanos) = (part(1), u32::try_from(part(2)).unwrap_or(0));
                if seconds <= 315_576_000_000 && nanos < 1_000_000_000 {
                    self.wait = self.wait.max(Some(Duration::new(seconds, nanos)));
                }
            } else if kind.ends_with(b"google.rpc.ErrorInfo")
                && let Some(reason) = Fields(message).find_map(|field| field.bytes(1))
            {
                self.reasons.push(String::from_utf8_lossy(reason).into_owned());
            }
        }
    }
}

/// Whether a head or trailers are those of a call that failed.
pub(crate) fn is_error(headers: &HeaderMap) -> bool {
    headers.get("grpc-status").is_some_and(|status| status != "0")
}

/// Whether the service asks not to send the call again: github.com/grpc/proposal/blob/master/A6-client-retries.md.
pub(crate) fn forbids_retry(headers: &HeaderMap) -> bool {
    let pushback = hint::values(headers, "grpc-retry-pushback-ms").next();
    pushback.is_some_and(|millis| millis.parse::<u64>().is_err())
}

/// The fields of a protobuf message, up to the first malformed one: protobuf.dev/programming-guides/encoding.
struct Fields<'a>(&'a [u8]);

struct Field<'a> {
    number: u64,
    value: Value<'a>,
}

enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    Other,
}

impl<'a> Field<'a> {
    fn bytes(&self, number: u64) -> Option<&'a [u8]> {
        match self.value {
            Value::Bytes(bytes) if self.number == number => Some(bytes),
            _ => None,
        }
    }

    fn number(&self, number: u64) -> Option<u64> {
        match self.value {
            Value::Number(value) if self.number == number => Some(value),
            _ => None,
        }
    }
}

impl<'a> Fields<'a> {
    fn varint(&mut self) -> Option<u64> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let byte = *self.0.split_off_first()?;
            number |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(number);
            }
        }
        None
    }

    fn bytes(&mut self, count: u64) -> Option<&'a [u8]> {
        self.0.split_off(..usize::try_from(count).ok()?)
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Field<'a>;

    fn next(&mut self) -> Option<Field<'a>> {
        let key = self.varint()?;
        let value = match key & 7 {
            0 => Value::Number(self.varint()?),
            1 => self.bytes(8).map(|_| Value::Other)?,
            2 => {
                let length = self.varint()?;
                Value::Bytes(self.bytes(length)?)
            }
            5 => self.bytes(4).map(|_| Value::Other)?,
            _ => return None,
        };
        Some(Field { number: key >> 3, value })
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    /// A field of bytes, as protobuf encodes it; all lengths here fit into one byte.
    fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
        [&[number << 3 | 2, bytes.len() as u8], bytes].concat()
    }

    fn detail(kind: &str, message: &[u8]) -> Vec<u8> {
        let kind = format!("type.googleapis.com/{kind}");
        field(3, &[field(1, kind.as_bytes()), field(2, message)].concat())
    }

    fn status(details: &[u8]) -> GrpcStatus {
        let encoded = BASE64_STANDARD_NO_PAD.encode(details);
        let headers = HeaderMap::from_iter([
            ("grpc-status".parse().unwrap(), HeaderValue::from_static("8")),
            ("grpc-status-details-bin".parse().unwrap(), encoded.parse().unwrap()),
        ]);
        GrpcStatus::of(&headers).unwrap()
    }

    #[test]
    fn details_are_read_in_any_order() {
        // 47 seconds and 500,000,000 nanoseconds.
        let delay = [0x08, 47, 0x10, 0x80, 0xCA, 0xB5, 0xEE, 0x01];
        let retry = detail("google.rpc.RetryInfo", &field(1, &delay));
        let reason = detail("google.rpc.ErrorInfo", &field(1, b"RATE_LIMIT_EXCEEDED"));
        let wait = Some(Duration::from_millis(47_500));
        let expected = GrpcStatus { code: 8, reasons: vec!["RATE_LIMIT_EXCEEDED".to_owned()], wait };
        let code = [0x08, 8];
        assert_eq!(status(&[&code[..], &retry, &reason].concat()), expected);
        assert_eq!(status(&[&reason[..], &code, &retry].concat()), expected);
    }

    #[test]
    fn a_delay_below_zero_is_no_wait() {
        let delay = [0x08, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x01];
        assert_eq!(status(&detail("google.rpc.RetryInfo", &field(1, &delay))).wait, None);
    }

    proptest! {
        #[test]
        fn f28_no_details_panic(details in prop::collection::vec(any::<u8>(), 0..100)) {
            status(&details);
        }

        #[test]
        fn f28_no_details_that_begin_well_panic(rest in prop::collection::vec(any::<u8>(), 0..60)) {
            status(&detail("google.rpc.RetryInfo", &rest));
            status(&detail("google.rpc.RetryInfo", &field(1, &rest)));
            status(&field(3, &rest));
        }
    }
}
