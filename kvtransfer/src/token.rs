//! The bearer token that opens a listener.
#![forbid(unsafe_code)]

use std::fmt;

use subtle::ConstantTimeEq;

/// A secret that a consumer presents as `authorization: Bearer …`. It never shows in debug output.
#[derive(Clone, PartialEq, Eq)]
pub struct BearerToken(String);

/// A token that no HTTP header can carry, or that protects nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a bearer token is 1 to {TOKEN_BYTES_MAX} visible ASCII characters")]
pub struct InvalidToken;

impl BearerToken {
    /// Takes 1 to [`TOKEN_BYTES_MAX`] visible ASCII characters.
    ///
    /// # Errors
    /// [`InvalidToken`] for anything else, so that a forgotten or broken secret cannot pass as "no token".
    pub fn new(token: impl Into<String>) -> Result<Self, InvalidToken> {
        let token = token.into();
        let fits = (1..=TOKEN_BYTES_MAX).contains(&token.len());
        if !fits || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(InvalidToken);
        }
        Ok(Self(token))
    }

    /// Whether an `authorization` header presents this token. The time it takes tells the token's length at most.
    #[must_use]
    pub fn accepts(&self, authorization: &[u8]) -> bool {
        let Some((scheme, token)) = authorization.split_at_checked(SCHEME.len()) else {
            return false;
        };
        let token = token.trim_ascii();
        scheme.eq_ignore_ascii_case(SCHEME.as_bytes()) && token.ct_eq(self.0.as_bytes()).into()
    }

    /// The header's value for a consumer.
    #[must_use]
    pub fn authorization(&self) -> String {
        format!("{SCHEME}{}", self.0)
    }
}

impl fmt::Debug for BearerToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BearerToken(..)")
    }
}

/// Longest token; header blocks are bounded too.
pub const TOKEN_BYTES_MAX: usize = 4_096;

/// RFC 6750 §2.1; the scheme's case does not matter (RFC 9110 §11.1).
const SCHEME: &str = "Bearer ";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_token_opens() {
        let token = BearerToken::new("s3cret").unwrap();
        assert!(token.accepts(b"Bearer s3cret"));
        assert!(token.accepts(b"bearer s3cret"));
        assert!(token.accepts(token.authorization().as_bytes()));
        for wrong in [
            &b""[..],
            b"Bearer",
            b"Bearer ",
            b"Bearer s3cre",
            b"Bearer s3crets",
            b"Basic s3cret",
            b"s3cret",
            b"\xff\xff",
        ] {
            assert!(!token.accepts(wrong), "{wrong:?}");
        }
        assert_eq!(format!("{token:?}"), "BearerToken(..)");
    }

    #[test]
    fn a_token_that_protects_nothing_is_refused() {
        for bad in [
            String::new(),
            "a b".into(),
            "a\n".into(),
            "é".into(),
            "x".repeat(TOKEN_BYTES_MAX + 1),
        ] {
            assert_eq!(BearerToken::new(bad), Err(InvalidToken));
        }
        assert!(BearerToken::new("x".repeat(TOKEN_BYTES_MAX)).is_ok());
    }
}
